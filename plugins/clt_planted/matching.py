"""The best one-to-one matching (the linear assignment problem), exactly.

The Hungarian method with shortest augmenting paths and potentials (Kuhn 1955; Jonker and Volgenant 1987), as it is
described in textbooks: O(rows² · columns), the loop over columns in numpy. scipy has one too, but nothing else here
needs scipy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def match(scores: Tensor) -> list[int | None]:
    """The column of each row, each column at most once, with the highest sum of scores.

    Args:
        scores: [rows, columns], finite. If there are more rows than columns, the rest of the rows gets None.
    """
    numbers = scores.double().cpu().numpy()
    if not numbers.size:
        return [None] * len(numbers)
    if numbers.shape[0] <= numbers.shape[1]:
        return [int(column) for column in _columns(-numbers)]
    out: list[int | None] = [None] * len(numbers)
    for column, row in enumerate(_columns(-numbers.T)):
        out[row] = column
    return out


def _columns(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row with the least sum of costs; there are no more rows than columns.

    Row by row: the shortest path, in costs reduced by the potentials, from the new row to a free column, over columns
    that are taken and the rows that have them. Along it every row then takes the next column.
    """
    rows, columns = cost.shape
    of_row, of_column = np.zeros(rows), np.zeros(columns)  # potentials
    owner = np.full(columns, -1)
    for first in range(rows):
        distance, previous = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, bool)
        row, column, reached = first, -1, 0.0
        while row >= 0:
            through = reached + cost[row] - of_row[row] - of_column
            shorter = ~done & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached, done[column] = distance[column], True
            row = owner[column]
        # Potentials: reduced costs stay >= 0, and are 0 along the path.
        of_row[first] += reached
        taken = done & (owner >= 0)
        of_row[owner[taken]] += reached - distance[taken]
        of_column[done] -= reached - distance[done]
        while column >= 0:
            owner[column] = owner[previous[column]] if previous[column] >= 0 else first
            column = previous[column]
    out = np.empty(rows, np.int64)
    out[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return out
