"""The largest of many numbers that are computed in blocks, for each of many rows.

Shapes: R rows, C columns of a block, n best.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 64
"""Columns that are first looked at together."""


def largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest numbers of each row of [R, C] and their columns, the largest first; all of them if C < n.

    The same numbers as `topk`, several times as fast: they are in the n groups of columns with the largest maxima.
    """
    rows, columns = values.shape
    n, groups = min(n, columns), columns // WIDTH
    if groups <= 2 * n:
        best = values.topk(n)
        return best.values, best.indices
    grouped = values[:, : groups * WIDTH].unflatten(1, (groups, WIDTH))
    chosen = grouped.amax(2).topk(n).indices
    every = torch.arange(columns, device=values.device)
    candidates = (chosen[:, :, None] * WIDTH + every[:WIDTH]).flatten(1)
    candidates = torch.cat([candidates, every[groups * WIDTH :].expand(rows, -1)], 1)
    best = values.gather(1, candidates).topk(n)
    return best.values, candidates.gather(1, best.indices)


class Nearest:
    """The n columns with the largest numbers of all that was shown, for each of R rows.

    Args:
        by_size: whether numbers are compared by their size; they keep their sign.
    """

    def __init__(self, rows: int, n: int, device: torch.device, *, by_size: bool = False):
        self.by_size = by_size
        self._score = torch.full((rows, n), -torch.inf, device=device)
        self._value = torch.zeros(rows, n, device=device)
        self._number = torch.full((rows, n), -1, dtype=torch.int32, device=device)

    def see(self, row: int, values: Tensor, number: int) -> None:
        """Look at a block.

        Args:
            row: the first row that it is of.
            values: [R, C]; -inf is never kept.
            number: of its first column.
        """
        n = self._score.shape[1]
        low, high = values.aminmax(dim=1)
        peak = torch.maximum(high, -low) if self.by_size else high
        worst = self._score[row : row + len(values), -1]
        # After some blocks, few rows have a number that belongs among their best.
        changed = (peak > worst).nonzero()[:, 0]
        if not len(changed):
            return
        shown, into = values[changed].contiguous(), row + changed
        score, column = largest(shown.abs() if self.by_size else shown, n)
        scores = torch.cat([self._score[into], score], 1)
        kept = scores.topk(n)
        self._score[into] = kept.values
        for all_best, new in ((self._value, shown.gather(1, column)), (self._number, (column + number).int())):
            all_best[into] = torch.cat([all_best[into], new], 1).gather(1, kept.indices)

    def best(self) -> tuple[Tensor, Tensor]:
        """Columns [R, n] int32 and their numbers [R, n], the largest first; -1 and 0 where there are fewer."""
        missing = self._score == -torch.inf
        return self._number.masked_fill(missing, -1), self._value.masked_fill(missing, 0)
