"""A source whose batches pass through the recipe's transforms. It stands in the source's place everywhere.

A training batch has the same number of rows at every step. Where transforms drop some, batches of the source ("raw"
batches) are read until there are enough:

order       rows are used in the order in which they were read
leftover    only rows of the last raw batch are kept for the next training batch. So the position is small: that of the
            source before its last raw batch, and how many of that batch's rows are left. Resumed, it is read again
ranks       all data ranks read on until the poorest has enough, and keep as many rows as the one that has fewest left.
            So the position is the same on all. What others have more is dropped too, and counted as `uneven`

For this the processes tell each other, after each raw batch, how many rows they have. Transforms that drop nothing need
none of it: no process waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.stateful import Stateful
from clt_plugins.data.batch import Batch, joined, last_rows, mapped
from clt_plugins.distributed.lend import lend
from clt_plugins.distributed.reading import a_batch
from clt_plugins.errors import ExitCode, Refused, Stopped, WrongReturn

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.reading.transform import Transform

MOST_EMPTY = 100
"""So many raw batches in a row, of which no row is left, end the run."""
MOST_HELD_OUT = 64
"""A held-out pass reads at most so many times the tokens that it is asked for, to make up for dropped ones."""


@attrs.frozen(eq=False)
class Read:
    """A raw batch after all transforms."""

    batch: Batch
    dropped: list[int]
    """How many rows each transform dropped."""


class TransformedSource:
    """A `Source` with the abilities of the one that it reads.

    Args:
        transforms: by name, in the order in which they are applied; at least one.
    """

    def __init__(self, source: Source, transforms: Sequence[tuple[str, Transform]], context: Context):
        self.source, self.context, self.parallel = source, context, context.parallel
        self.names = [name for name, _ in transforms]
        self.transforms = [transform for _, transform in transforms]
        self.drops = any(transform.drops for transform in self.transforms)
        self.share = context.batch_share()
        self.n_layers, self.d_model = source.n_layers, source.d_model
        self.number = 0
        """Of the next raw batch."""
        self.rest: Batch | None = None
        """Rows of the last raw batch that are left."""
        self.before: dict[str, Any] = {}
        """The position before that batch."""
        self.left = 0
        """How many rows are left; those that are not in `rest` have to be read again."""
        self.counts: dict[str, int] = self._no_counts()
        """Rows dropped since the last log, of all data ranks, by name."""
        self.is_alone = False
        """Whether no other rank reads just now: see `alone`."""
        self.asked: dict[int, int] = {}
        """How many held-out tokens of the source give how many that were asked for."""
        lend(source, self)

    # -- training -----------------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next training batch.

        Raises:
            Refused: transforms leave no row of many batches in a row.
            Stopped: on ranks that must stop because another one could not read; without a text.
        """
        if not self.drops:
            return self._read().batch
        parts = [] if self.rest is None else [self.rest]
        have, empty = sum(part.tokens for part in parts), 0
        again = self.left if self.rest is None else 0
        while True:
            before = self._position()
            read, error = None, None
            try:
                read = self._read()
                if again:  # its other rows were trained on, and what was dropped was counted, before the run stopped
                    read = Read(last_rows(read.batch, min(again, read.batch.tokens)), [0] * len(self.names))
            except Exception as wrong:
                error = wrong
            last = 0 if read is None else read.batch.tokens
            have, again = have + last, 0
            ranks = self._exchange([error is not None, have, last, *(read.dropped if read else [0] * len(self.names))])
            if error is not None:
                raise error
            if any(rank[0] for rank in ranks):
                raise Stopped(ExitCode.FAILED, "")  # follows the one that says why
            assert read is not None
            self._count(ranks)
            parts.append(read.batch)
            if min(rank[1] for rank in ranks) >= self.share:
                break
            # A source may use a batch's memory again when it is asked for the next one.
            parts[-1] = mapped(read.batch, torch.clone)
            empty = 0 if all(rank[2] for rank in ranks) else empty + 1
            if empty == MOST_EMPTY:
                raise Refused("transforms", f"they drop every row of {empty} batches in a row{self._told()}")
        self.left = min(min(rank[1] - self.share, rank[2]) for rank in ranks)
        self.counts["uneven"] += sum(rank[1] - self.share - self.left for rank in ranks)
        self.before = before
        self.rest = mapped(last_rows(parts[-1], self.left), torch.clone) if self.left else None
        return joined(parts, self.share)

    def _read(self) -> Read:
        """The next raw batch, transformed."""
        number, self.number = self.number, self.number + 1
        return self._apply(a_batch(self.source).to(self.context.device), number)

    def _apply(self, batch: Batch, number: int) -> Read:
        """
        Raises:
            WrongReturn: a transform did not return a batch of the same tokens, or of some of them.
        """
        dropped = []
        for transform in self.transforms:
            rows = batch.tokens
            if number >= 0 or transform.held_out:
                new = transform(batch, number)
                if wrong := _wrong(new, batch, transform.drops):
                    raise WrongReturn(transform, f"a transform must return {wrong}")
                batch = new
            dropped.append(rows - batch.tokens)
        return Read(batch, dropped)

    def _exchange(self, row: list[int]) -> list[list[int]]:
        """The rows of all data ranks; of this one alone where there are no others (any more), or none that read."""
        if self.parallel.world == 1 or self.is_alone:
            return [row]
        table = torch.zeros(self.parallel.world, len(row) + 1, dtype=torch.int64)
        table[self.parallel.rank] = torch.tensor([1, *row])
        table = self.parallel.total(table, over="all", what="agreement")
        # Ranks that share a batch have the same numbers of rows; a failure of one of them counts.
        by_data = table.view(-1, self.parallel.tensor_ranks, len(row) + 1).amax(1)
        return by_data[by_data[:, 0] > 0, 1:].tolist()

    def _count(self, ranks: list[list[int]]) -> None:
        for index, name in enumerate(self.names):
            self.counts[name] += sum(rank[3 + index] for rank in ranks)

    def _told(self) -> str:
        """Who dropped most, and the remedy."""
        name = max(self.names, key=lambda name: self.counts[name])
        return f": {name!r} dropped most of them: change its settings, or leave it out"

    def _no_counts(self) -> dict[str, int]:
        return dict.fromkeys([*self.names, "uneven"], 0)

    def take_counts(self) -> dict[str, int]:
        """Rows dropped since the last call, of all data ranks, as metrics; nothing without transforms that drop."""
        counts, self.counts = self.counts, self._no_counts()
        dropping = {name for name, one in zip(self.names, self.transforms, strict=True) if one.drops}
        if self.drops and self.parallel.data_ranks > 1:
            dropping.add("uneven")
        return {f"transforms/{name}_dropped": count for name, count in counts.items() if name in dropping}

    # -- held out -----------------------------------------------------------------------------------------------

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """Held-out batches of the source, transformed by those transforms that say so; `tokens` in all, or all there
        are, or what is left of 64 times as many."""
        if not any(one.held_out and one.drops for one in self.transforms):
            for batch, _ in self._held_out(tokens):
                yield batch
            return
        if tokens not in self.asked:
            asked = tokens
            while True:
                read = [(batch.tokens, raw) for batch, raw in self._held_out(asked)]
                enough, ended = sum(kept for kept, _ in read) >= tokens, sum(raw for _, raw in read) < asked
                if enough or ended or asked >= MOST_HELD_OUT * tokens:
                    break
                asked *= 2
            self.asked[tokens] = asked
        missing = tokens
        for batch, _ in self._held_out(self.asked[tokens]):
            batch = batch.rows(slice(0, missing))
            missing -= batch.tokens
            if batch.tokens:
                yield batch
            if not missing:
                return

    def _held_out(self, tokens: int) -> Iterator[tuple[Batch, int]]:
        """Held-out batches, transformed, and how many rows each had."""
        for index, batch in enumerate(self.source.held_out(tokens)):
            # Numbers below 0: random ones are not those of a training batch.
            yield self._apply(batch.to(self.context.device), -1 - index).batch, batch.tokens

    def statistics(self) -> Mapping[str, Tensor] | None:
        """None: stored ones are those of other numbers and rows."""
        return None

    # -- resuming -----------------------------------------------------------------------------------------------

    def _position(self) -> dict[str, Any]:
        states = [one.state() if isinstance(one, Stateful) else None for one in self.transforms]
        return {"of_source": self.source.state(), "number": self.number, "transforms": states}

    def state(self) -> dict[str, Any]:
        """The source's position, the transforms' states, and how many rows are left; the same on all ranks."""
        if not self.drops:
            return self._position()
        position = self.before if self.left else self._position()
        return {**position, "left": self.left, "dropped": dict(self.counts), "data_ranks": self.parallel.data_ranks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`; from a source's own state too, if that run had no transforms."""
        self.rest, self.left, self.number, self.counts = None, 0, 0, self._no_counts()
        if "of_source" not in state:
            self.source.load_state(state)
            return
        self.source.load_state(state["of_source"])
        self.number = state["number"]
        for transform, saved in zip(self.transforms, state["transforms"], strict=False):
            if isinstance(transform, Stateful) and saved is not None:
                transform.load_state(saved)
        if self.drops and "left" in state:
            self.before = {name: state[name] for name in ("of_source", "number", "transforms")}
            # With other ranks (accepted by the user) as many rows in all, as nearly as they can be divided.
            self.left = state["left"] * state["data_ranks"] // self.parallel.data_ranks
            self.counts |= {name: count for name, count in state["dropped"].items() if name in self.counts}


def transformed(source: Source, transforms: Sequence[Transform], context: Context) -> Source:
    """A source whose batches pass through the transforms of the context's recipe; the source itself without any."""
    if not transforms:
        return source
    assert context.recipe is not None
    names: list[str] = []
    for chosen in context.recipe.transforms:
        earlier = sum(name.split(".")[0] == chosen.name for name in names)
        names.append(f"{chosen.name}.{earlier + 1}" if earlier else chosen.name)
    return TransformedSource(source, list(zip(names, transforms, strict=True)), context)


@contextmanager
def alone(source: Source) -> Iterator[None]:
    """A block in which this rank reads, and others do not; the source's state is to be set back afterwards."""
    if isinstance(source, TransformedSource):
        source.is_alone = True
    try:
        yield
    finally:
        if isinstance(source, TransformedSource):
            source.is_alone = False


def load_position(source: Source, state: dict[str, Any]) -> None:
    """Put a source into a checkpoint's state, also if that run had transforms and this one has none."""
    if not isinstance(source, TransformedSource) and "of_source" in state:
        state = state["of_source"]
    source.load_state(state)


def _wrong(new: Any, batch: Batch, drops: bool) -> str:
    """What a transform should have returned, and what it did; "" if that is right."""
    if not isinstance(new, Batch):
        return f"a Batch, got {type(new).__name__}"
    if new.inputs.shape[1:] != batch.inputs.shape[1:]:
        return f"activations of {list(batch.inputs.shape[1:])}, got {list(new.inputs.shape[1:])}"
    if new.tokens > batch.tokens or (not drops and new.tokens != batch.tokens):
        few = "at most " if drops else ""
        remedy = "" if drops else ": one that drops rows says `drops = True`"
        return f"{few}{batch.tokens} rows, got {new.tokens}{remedy}"
    for name in ("token_ids", "positions"):
        before, after = getattr(batch, name), getattr(new, name)
        if (before is None) != (after is None):
            return f"{name} as it got them, got {'none' if after is None else 'some'}"
        if after is not None and len(after) != new.tokens:
            return f"{name} of each of its {new.tokens} rows, got {len(after)}"
    return ""
