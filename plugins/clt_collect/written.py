"""The complete log of a pass over text, mapped: what stands in its files is told in `log`."""

from __future__ import annotations

import attrs
import numpy as np

from clt_collect.log import COLUMNS, Array, Commit, Log, length_of


@attrs.frozen(eq=False)
class Written:
    """The complete log of one rank, mapped."""

    columns: dict[str, Array]
    commit: Commit
    own: range
    """The features of each layer that it has."""

    @classmethod
    def open(cls, log: Log, commit: Commit, rank: int, own: range, n_layers: int) -> Written:
        """Map the log of a rank, whose files are beside those of `log`."""
        columns: dict[str, Array] = {}
        for column, dtype in COLUMNS.items():
            length = length_of(column, commit, n_layers * len(own))
            path = log.folder / f"{column}-{rank}.bin"
            # An empty file cannot be mapped.
            columns[column] = np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)
        columns["start"] = columns["start"].reshape(commit.shards, n_layers * len(own) + 1)
        return cls(columns, commit, own)
