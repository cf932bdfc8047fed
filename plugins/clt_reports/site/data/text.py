"""The text that was read, in files of whole contexts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from clt_reports.site.data.pack import packed, put
from clt_reports.site.data.words import Words

ROWS = 2**14
"""Rows of a file, at least, but for the last. Thirty-odd of them hold the examples of a feature: 20 to 30 kB each."""

READ = 2**20
"""Rows that are looked at together."""


def write_text(folder: Path, ids: np.ndarray, context: np.ndarray, position: np.ndarray, words: Words) -> list[int]:
    """Write `data/text/`; returns the first row of each file, and T.

    Args:
        ids, context, position: of each row, [T]; they may be mapped.
    """
    rows = cuts(context)
    for number, (first, stop) in enumerate(pairwise(rows)):
        part = slice(first, stop)
        arrays = {"word": words.of(ids[part]), "context": context[part], "position": position[part]}
        put(folder, f"text/{number:04}", packed(arrays))
    return rows


def cuts(context: np.ndarray) -> list[int]:
    """The first row of each file, and T; contexts are not divided."""
    rows = [0]
    total = len(context)
    for first in range(1, total, READ):
        stop = min(first + READ, total)
        starts = first + np.flatnonzero(context[first:stop] != context[first - 1 : stop - 1])
        while (n := int(np.searchsorted(starts, rows[-1] + ROWS))) < len(starts):
            rows.append(int(starts[n]))
    return [*rows, total] if total else [0]
