"""How the rows of an endless sequence are dealt to data ranks: each row once, also where the number of ranks changes.

Rows are numbered 0, 1, 2, ... through all epochs. They are cut into groups, as many rows as all ranks shuffle at a
time; no group goes over the end of an epoch. Each rank gets a stretch of every group and shuffles it in memory. Ranks
are dealt equally many rows: as many of any n rows as if they were dealt one by one, in turn.

Where the number of ranks changes in the middle of a group, what is left of the group is known by arithmetic: the rest
of each stretch, in the order in which it was shuffled. These rows are dealt to the new ranks first, then new groups
begin. So a position is a few numbers: how many rows were dealt in total, where groups begin, and to how many ranks
they were dealt. It is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins.data.random import generator

ENDLESS = 2**62
"""Rows of an epoch that never ends."""

Numbers = range | Tensor
"""Numbers of rows, ascending: neighbours, or with gaps [R] int64."""


@attrs.frozen
class Turn:
    """A stretch of a run with one number of ranks."""

    start: int
    """How many rows were dealt before it, to all ranks."""
    ranks: int
    group: int
    """Rows that all ranks together shuffle at a time."""

    def share(self, total: int, rank: int) -> int:
        """How many of the rows dealt since `start` a rank has, when `total` were dealt since the beginning."""
        return (total - self.start + self.ranks - 1 - rank) // self.ranks


@attrs.frozen(eq=False)
class Group:
    """The rows that a rank shuffles together."""

    rows: Numbers
    start: int
    """How many rows the rank was dealt before these in this turn."""
    begin: int
    end: int
    """All rows before `begin` were dealt before; when all ranks' parts of the rows up to `end` are dealt, the next
    region begins there."""
    key: tuple[int, ...]
    """With the seed, it decides the order in which the rows are yielded."""

    @property
    def count(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    def order(self, seed: int) -> Tensor:
        """The rows' indices [R] in the order in which they are yielded."""
        return torch.randperm(self.count, generator=generator(seed, "rows", *self.key))

    def among(self, begin: int, end: int) -> slice | Tensor:
        """Which of the rows from number `begin` up to `end` it has, as indices that count from `begin`."""
        if isinstance(self.rows, range):
            first = max(self.rows.start - begin, 0)
            return slice(first, max(min(self.rows.stop, end) - begin, first))
        low, high = torch.searchsorted(self.rows, torch.tensor([begin, end])).tolist()
        return self.rows[low:high] - begin


class Deal:
    """The rows that one rank is dealt.

    Args:
        seed: with the rows' numbers, it decides how stretches are shuffled.
        group: rows that all ranks together shuffle at a time.
        epoch: rows of an epoch.
    """

    def __init__(self, seed: int, group: int, rank: int = 0, ranks: int = 1, *, epoch: int = ENDLESS):
        self.seed, self.rank, self.epoch = seed, rank, epoch
        self.turns = [Turn(0, ranks, group)]
        """The turns that have left rows of the present region, and the present turn."""
        self.grid = 0
        """The row at which the first turn's groups begin."""
        self.rest: Numbers = range(0)
        """Rows left by earlier turns, to be dealt first."""
        self.region = (0, 0)
        """Where the group begins and ends that they are of."""

    @property
    def turn(self) -> Turn:
        """The present turn."""
        return self.turns[-1]

    def at(self, position: int) -> Group:
        """The group of the row that this rank is dealt after `position` others of the present turn."""
        turn = self.turn
        count = turn.start + position * turn.ranks + self.rank
        begin, end = self.region
        if count < end:
            first = end - len(self.rest)
            at = (count - first) // turn.group * turn.group
            rows, first = self.rest[at : at + turn.group], first + at
            stretches = self._cut(rows, first, turn)
        else:
            begin, end = self._region(turn, max(self.grid, self.region[1]), count)
            rows, first = range(begin, end), begin
            stretches = self._cut(rows, first, turn)
        stretch = next(part for rank, part in enumerate(stretches) if rank == self.rank)
        return Group(stretch, turn.share(first, self.rank), begin, end, self._key(stretch, turn))

    def total(self, position: int) -> int:
        """How many rows all ranks were dealt when each has had `position` of the present turn."""
        return self.turn.start + position * self.turn.ranks

    def state(self, position: int) -> dict[str, Any]:
        """The position as JSON; the same on every rank."""
        total = self.total(position)
        over = len(self.turns) > 1 and total >= self.region[1]
        turns, grid = ([self.turn], self.region[1]) if over else (self.turns, self.grid)
        return {"rows": total, "grid": grid, "turns": [list(attrs.astuple(turn)) for turn in turns]}

    def load_state(self, state: dict[str, Any]) -> int:
        """Go to a state, which other ranks may have saved, more or fewer; returns the position in the present turn."""
        total, present = state["rows"], self.turn
        turns, grid = [Turn(*turn) for turn in state["turns"]], state["grid"]
        if turns[-1].start == total and len(turns) > 1:
            turns.pop()  # nothing was dealt in it
        if (turns[-1].ranks, turns[-1].group) != (present.ranks, present.group):
            turns.append(Turn(total, present.ranks, present.group))
        self._enter(turns, grid, total)
        return (total - self.turn.start) // self.turn.ranks

    def _enter(self, turns: list[Turn], grid: int, total: int) -> None:
        """Work out which rows the earlier turns have left."""
        while len(turns) > 1:
            begin, end = self._region(turns[0], grid, turns[1].start)
            if turns[1].start == begin:  # the first turn has left nothing: it ended between two groups
                turns, grid = turns[1:], begin
            elif (turns[2].start if len(turns) > 2 else total) >= end:  # the second has dealt all that the first left
                turns, grid = turns[1:], end
            else:
                self.region, self.rest = (begin, end), range(begin, end)
                for turn, following in pairwise(turns):
                    self.rest = self._left(self.rest, end - len(self.rest), turn, following.start)
                break
        else:
            self.region, self.rest = (grid, grid), range(0)
        self.turns, self.grid = turns, grid

    def _region(self, turn: Turn, grid: int, row: int) -> tuple[int, int]:
        """Begin and end of the group of all ranks that has a row."""
        number = row // self.epoch
        first = max(grid, number * self.epoch)
        begin = first + (row - first) // turn.group * turn.group
        return begin, min(begin + turn.group, (number + 1) * self.epoch)

    def _cut(self, rows: Numbers, first: int, turn: Turn) -> Iterator[Numbers]:
        """Each rank's stretch of a group whose first row is dealt after `first` others."""
        at = 0
        for rank in range(turn.ranks):
            size = turn.share(first + len(rows), rank) - turn.share(first, rank)
            yield rows[at : at + size]
            at += size

    def _left(self, rows: Numbers, first: int, turn: Turn, total: int) -> Tensor:
        """What a turn leaves of rows, the first of which is dealt after `first` others, when it ends at `total`."""
        left = []
        for at in range(0, len(rows), turn.group):
            group, before = rows[at : at + turn.group], first + at
            if before + len(group) <= total:
                continue
            for rank, stretch in enumerate(self._cut(group, before, turn)):
                done = max(0, turn.share(total, rank) - turn.share(before, rank))
                kept = torch.arange(stretch.start, stretch.stop) if isinstance(stretch, range) else stretch
                if done:
                    order = Group(stretch, 0, 0, 0, self._key(stretch, turn)).order(self.seed)
                    kept = kept[order[done:]]
                left.append(kept)
        return torch.cat(left).sort().values

    def _key(self, stretch: Numbers, turn: Turn) -> tuple[int, ...]:
        if not len(stretch):
            return ()
        epoch, row = divmod(int(stretch[0]), self.epoch)
        # Rows that an earlier turn has left are shuffled anew.
        return (epoch, row) if isinstance(stretch, range) else (epoch, row, turn.start)
