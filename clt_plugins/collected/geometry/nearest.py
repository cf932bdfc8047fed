"""The largest of many numbers that are computed in blocks, for each of many rows.

Shapes: R rows, C columns of a block, n best.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Nearest:
    """The n columns with the largest numbers of all that was shown, for each of R rows.

    Args:
        by_size: whether numbers are compared by their size; they keep their sign.
    """

    def __init__(self, rows: int, n: int, device: torch.device, *, by_size: bool = False):
        self.by_size = by_size
        self._nothing = 0.0 if by_size else -torch.inf
        self._value = torch.full((rows, n), self._nothing, device=device)
        self._number = torch.full((rows, n), -1, dtype=torch.int32, device=device)

    def see(self, row: int, values: Tensor, number: int) -> None:
        """Look at a block.

        Args:
            row: the first row that it is of.
            values: [R, C]; -inf is never kept, and with `by_size` 0 is not.
            number: of its first column.
        """
        peak = torch.maximum(values.amax(1), -values.amin(1)) if self.by_size else values.amax(1)
        # After some blocks, few rows have a number that belongs among their best.
        changed = (peak > self._score(self._value[row : row + len(values), -1])).nonzero()[:, 0]
        if not len(changed):
            return
        shown = values if len(changed) == len(values) else values[changed]
        n = min(self._value.shape[1], shown.shape[1])
        highest = shown.topk(n)
        best = [(highest.values, highest.indices)]
        if self.by_size:
            # Numbers that are among both count once: those below 0 as 0 among the largest, and the other way round.
            lowest = shown.topk(n, largest=False)
            best = [(highest.values.clamp_min(0), highest.indices), (lowest.values.clamp_max(0), lowest.indices)]
        into = row + changed
        value = torch.cat([self._value[into], *(value for value, _ in best)], 1)
        numbers = torch.cat([self._number[into], *((column + number).int() for _, column in best)], 1)
        kept = self._score(value).topk(self._value.shape[1]).indices
        self._value[into], self._number[into] = value.gather(1, kept), numbers.gather(1, kept)

    def best(self) -> tuple[Tensor, Tensor]:
        """Columns [R, n] int32 and their numbers [R, n], the largest first; -1 and 0 where there are fewer."""
        missing = self._value == self._nothing
        return self._number.masked_fill(missing, -1), self._value.masked_fill(missing, 0)

    def _score(self, value: Tensor) -> Tensor:
        return value.abs() if self.by_size else value
