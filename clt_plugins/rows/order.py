"""The order in which stored rows are trained on: arithmetic only, so that a position in it is one number.

Rows lie in chunks (files), each cut into blocks of neighbouring rows; the last block of a chunk may be short. Every
epoch has its own order of all blocks, a keyed permutation that is computed number by number. The rows of the epochs,
one after the other, are dealt to the data ranks: see `deal`.

Nothing here grows with the number of rows; one number per chunk is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from clt_plugins.data.random import digest

ROUNDS = 6
"""Of the Feistel network; four make a pseudo-random permutation of pseudo-random functions (Luby, Rackoff 1988)."""


class Permutation:
    """A keyed permutation of the numbers below `count`, computed number by number.

    A Feistel network permutes the numbers of an even count of bits. A result of `count` or more is permuted again
    until it is less (cycle walking: less than four times on average).
    """

    def __init__(self, count: int, *key: Any):
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half) - 1
        self.keys = [digest(*key, number) for number in range(ROUNDS)]

    def __call__(self, number: int) -> int:
        """The number that `number` becomes."""
        while True:
            left, right = number >> self.half, number & self.mask
            for key in self.keys:
                left, right = right, left ^ self._mix(right, key)
            number = left << self.half | right
            if number < self.count:
                return number

    def inverse(self, number: int) -> int:
        """The number that becomes `number`."""
        while True:
            left, right = number >> self.half, number & self.mask
            for key in reversed(self.keys):
                left, right = right ^ self._mix(left, key), left
            number = left << self.half | right
            if number < self.count:
                return number

    def _mix(self, number: int, key: int) -> int:
        # The finaliser of splitmix64 (Steele et al. 2014).
        z = (number + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return (z ^ z >> 31) & self.mask


class Order:
    """One epoch's order of the rows: all blocks, permuted.

    Args:
        chunks: rows of each chunk.
        block_rows: rows of a block; the last one of a chunk has what is left.
        key: alone decides the permutation.
    """

    def __init__(self, chunks: Sequence[int], block_rows: int, *key: Any):
        self.chunks, self.block_rows = chunks, block_rows
        self.first = [0, *accumulate(-(-rows // block_rows) for rows in chunks)]
        """The number of each chunk's first block; at the end, of all blocks."""
        self.blocks = self.first[-1]
        self.permutation = Permutation(self.blocks, *key)
        short = sorted(
            (self.permutation.inverse(self.first[chunk + 1] - 1), -rows % block_rows)
            for chunk, rows in enumerate(chunks)
            if rows % block_rows
        )
        self.short = [position for position, _ in short]
        """Positions of short blocks in the order, ascending."""
        self.lacking = [0, *accumulate(rows for _, rows in short)]
        """How many rows the first 0, 1, 2, ... short blocks lack."""

    def block(self, position: int) -> tuple[int, int, int]:
        """(chunk, first row in it, number of rows) of the block at a position in the order."""
        number = self.permutation(position)
        chunk = bisect_right(self.first, number) - 1
        begin = (number - self.first[chunk]) * self.block_rows
        return chunk, begin, min(self.block_rows, self.chunks[chunk] - begin)

    def before(self, position: int) -> int:
        """How many rows the blocks before a position have."""
        return position * self.block_rows - self.lacking[bisect_right(self.short, position - 1)]

    def position(self, row: int) -> int:
        """The position of the block that holds the epoch's row of this number."""
        return bisect_right(range(self.blocks + 1), row, key=self.before) - 1
