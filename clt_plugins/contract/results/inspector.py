"""What `clt_inspectors` returns: what says for the command `inspect` what a folder of a plugin's holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs


@attrs.frozen(kw_only=True)
class Inspected:
    """What a folder holds."""

    text: str
    """For people."""
    data: Mapping[str, Any]
    """The same as plain JSON data."""
    faults: Sequence[str] = ()
    """What is damaged, a line each; the command then ends with 1."""


class Inspector(Protocol):
    """Looks into folders of one kind."""

    def recognises(self, place: Path) -> bool:
        """A quick look at the names of files: is it this kind?"""

    def inspect(self, place: Path, *, verify: bool) -> Inspected:
        """What is in the folder.

        Args:
            verify: read all of it and check it.

        Raises:
            Refused: it cannot be described at all.
        """
