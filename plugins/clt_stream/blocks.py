"""Blocks of the stream: which forward passes each needs, and how they are run.

Tensor ranks need the same rows. Each runs the next pass in turn, and sends its rows to the others: every rank then has
the same bits. On a GPU passes are queued on a CUDA stream of their own, a few in every training step.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import Group, Sends
from clt_stream.contexts import Contexts, Cursor, Packer
from clt_stream.finite import finite_later
from clt_stream.reader import Reader
from clt_stream.rows import Rows

if TYPE_CHECKING:
    from clt_plugins import Parallel


@attrs.frozen
class Start:
    """Where a block begins: `skip` rows after a context, which begins a forward pass."""

    cursor: Cursor
    skip: int
    row: int
    """The number of the block's first row."""


@attrs.frozen(eq=False)
class Pass:
    """A forward pass."""

    contexts: Contexts
    rows: Tensor
    """Which of its rows the block has, [R]."""
    at: int
    """Where they go in the block."""


@attrs.frozen(eq=False)
class Block:
    """What a rank reads of a block of all ranks."""

    group: Group
    start: Start
    following: Start
    """Where the next block begins."""
    passes: list[Pass]
    passed: int
    """Rows of the last pass."""
    carried: int | None
    """How many of them lie after the end of the block, for the next one; None if they must be computed again."""


def plan(packer: Packer, group: Group, start: Start, before: Block | None, *, alone: bool) -> Block:
    """The passes that a block needs.

    Args:
        before: the block before, if what its last pass has carried over is at the beginning of the memory already.
        alone: whether there is one data rank: it goes on to the next block with the rows of the last pass that are
            after the end of this one. What earlier ranks have left has gaps; its block is read from its start again.
    """
    alone = alone and isinstance(group.rows, range)
    cursor, filled, passed = start.cursor, 0, 0
    if before is None or before.carried is None:
        packer.seek(cursor)
        row = group.begin - start.skip  # the number of the first row of the next pass
    else:
        filled, passed = before.carried, before.passed
        row = group.begin + filled
    passes = []
    while row < group.end:
        cursor, contexts = packer.cursor(), packer.next()
        assert contexts is not None, "the trained part of a text never ends"
        passed = len(contexts.rows)
        chosen = group.among(row, row + passed)
        rows = contexts.rows[chosen.start :] if alone and isinstance(chosen, slice) else contexts.rows[chosen]
        if len(rows):
            passes.append(Pass(contexts, rows, filled))
            filled += len(rows)
        row += passed
    beyond = row - group.end
    following = Start(cursor if beyond else packer.cursor(), passed - beyond if beyond else 0, group.end)
    return Block(group, start, following, passes, passed, beyond if alone else None)


class Turns:
    """How passes are divided among the ranks that share features.

    Args:
        parallel: sends rows if it can (`Sends`); otherwise every rank runs all passes.
    """

    def __init__(self, parallel: Parallel):
        self.parallel = parallel

    @property
    def ranks(self) -> int:
        """How many ranks take turns."""
        able = isinstance(self.parallel, Sends) and self.parallel.connected
        return self.parallel.tensor_ranks if able else 1

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A block that all of them finish, or none: no rank must wait for rows that never come.

        Raises:
            ConnectionError: another rank failed. Without a text: that one says why.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as wrong:
            error = wrong
        if self.ranks > 1:
            failed = self.parallel.total(torch.tensor(int(error is not None)), over="features", what="agreement")
            if error is None and bool(failed):
                raise ConnectionError
        if error is not None:
            raise error

    def send(self, rows: Rows, at: slice, rank: int) -> list[Callable[[], None]]:
        """Begin to send the activations of one rank to the others; the results wait for it."""
        assert isinstance(self.parallel, Sends)
        return [self.parallel.send_later(x[at], rank) for x in (rows.inputs, rows.targets)]


class Filling:
    """A block that is read pass by pass.

    Args:
        into: its memory.
        stream: the CUDA stream on which passes are queued; None: the current one.
    """

    def __init__(self, block: Block, reader: Reader, into: Rows, turns: Turns, stream: torch.cuda.Stream | None = None):
        self.block, self.reader, self.into, self.turns, self.stream = block, reader, into, turns, stream
        self.begun = 0
        """Passes that were begun, by any rank."""
        self.under_way: list[Callable[[], None]] = []
        self.error: Exception | None = None
        """Why a pass of this rank failed: the others are still waiting for rows."""
        self.finite: Callable[[], None] | None = None
        """Raises if a number of the block is not finite."""

    def carry_over(self, rows: Rows, begin: int, count: int) -> None:
        """Put the last rows of the block before at the beginning."""
        with self._queued():
            self.into.take(rows, slice(begin, begin + count), 0)

    def rounds(self) -> int:
        """How many times all ranks take turns."""
        return -(-len(self.block.passes) // self.turns.ranks)

    def advance(self, rounds: int) -> None:
        """Go on: each rank runs a pass in each round."""
        with self._queued():
            for _ in range(rounds):
                self._round()
            if self.begun >= len(self.block.passes) and self.finite is None:
                self._received()
                self.finite = finite_later(self.into.view(slice(0, self.block.group.count)), self.reader.layers)

    def finish(self) -> None:
        """Run what is left; the rows are there for what the current stream does next. `check` them then.

        Raises:
            Exception: what a pass of this rank raised. Other ranks have its rows as they are, and do not know.
        """
        self.advance(self.rounds())
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        if self.error is not None:
            raise self.error

    def check(self) -> None:
        """Look whether all rows are numbers.

        Raises:
            Refused: one is not finite; the same on all ranks.
        """
        assert self.finite is not None
        self.finite()

    def drop(self) -> None:
        """Wait for rows that are still being sent."""
        with self._queued():
            self._received()

    def _round(self) -> None:
        ranks = self.turns.ranks
        passes = self.block.passes[self.begun : self.begun + ranks]
        self.begun += len(passes)
        for rank, each in enumerate(passes):
            at = slice(each.at, each.at + len(each.rows))
            self.into.label(each.contexts, each.rows, at)
            if ranks == 1 or rank == self.turns.parallel.tensor_rank:
                try:
                    self.reader.read(each.contexts, each.rows, self.into, each.at)
                except Exception as error:
                    if ranks == 1:
                        raise
                    self.error = self.error or error
        if ranks > 1:
            for rank, each in enumerate(passes):
                self.under_way += self.turns.send(self.into, slice(each.at, each.at + len(each.rows)), rank)

    def _received(self) -> None:
        for wait in self.under_way:
            wait()
        self.under_way = []

    @contextmanager
    def _queued(self) -> Iterator[None]:
        """What is inside is queued on the stream, after what the current one has queued by now."""
        if self.stream is None:
            yield
            return
        if not self.begun:  # the memory was read until now
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield
