"""What `format` of the stage `report` builds: features made into something to look at, or into another tool's files."""

from __future__ import annotations

from typing import Any, Protocol


class Report(Protocol):
    """Writes what is known of a transcoder's features in one form: a site, files of another tool.

    Everything comes from a store that `collect` wrote: no model is run. It may also be one that `Checks`: then what the
    form cannot show is refused before training.
    """

    def write(self, collected: Any, facts: Any, folder: Any) -> None:
        """Write the files into an empty folder, the same bytes each time.

        Args:
            collected: a `Collected`: statistics, examples and geometry of each feature, read layer by layer. What is
                not in it is left out, or refused.
            facts: a `Facts`: the run's recipe, curves and evaluation, each of which may be missing.
            folder: a `Path`.

        Raises:
            Refused: the store lacks what the form needs; says what, and how to collect it.
        """
