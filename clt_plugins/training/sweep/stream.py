"""One source for many runs: each batch is read once, and handed to all.

Every run has a `Reader`, a source of its own with a position of its own. Readers that take turns (the one that is
furthest behind goes first) find the batch in memory that the first of them has read. A reader that goes elsewhere, such
as a callback that looks at the next batches and puts them back, finds them too, up to `HELD` batches ahead of what
others need. Anything else is read again from the source's state, as a run alone does it. So what a reader gives never
depends on the others.

Transforms are no part of it: each run has its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.reading.source import Closable
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.lend import lend
from clt_plugins.distributed.reading import a_batch
from clt_plugins.errors import PluginError, Refused
from clt_plugins.training.sweep.draws import Draws

if TYPE_CHECKING:
    from clt_plugins.contract.reading.source import Source

HELD = 4
"""Batches that are kept at most."""


DRAWS = (
    "it draws from torch's own generators, from which each member of a sweep draws too, so that each would read other "
    "batches: it must draw from `clt_plugins.generator`; or train one member at a time, --at-once 1"
)


@attrs.define(eq=False)
class Held:
    """A batch in memory."""

    before: dict[str, Any]
    """The source's state before it."""
    after: dict[str, Any]
    batch: Batch
    versions: list[int] = attrs.field(factory=list)
    """How often torch has changed its tensors in place."""
    own: bool = False
    """Whether its memory is not the source's."""

    def check(self) -> None:
        """
        Raises:
            PluginError: somebody has changed it, so that others would read other numbers.
        """
        if self.versions != _versions(self.batch):
            text = "a batch was changed in place; other members of the sweep read the same: change a copy"
            raise PluginError(f"source: {text}", where=("source",))


class Stream:
    """A source that several readers share.

    Args:
        source: as built; it must not be read by anybody else.
        device: where batches go.
    """

    def __init__(self, source: Source, device: torch.device):
        self.source, self.device = source, device
        self.readers: list[Reader] = []
        self.state = source.state()
        """Where the source stands."""
        self.held: list[Held] = []
        self.text: tuple[str, Any] = ("", None)
        """The last texts that were read for losses that run the model, by what was asked."""
        self.failure: Exception | None = None
        """Why no more can be read."""
        self.batches = 0
        """How many were read from the source."""

    def reader(self) -> Reader:
        """A source at the present position."""
        self.readers.append(Reader(self))
        return self.readers[-1]

    def after(self, state: dict[str, Any]) -> Held:
        """The batch that comes after a state."""
        self._drop()
        for held in self.held:
            if held.before == state:
                held.check()
                return held
        for held in self.held:
            if not held.own:  # a source may use a batch's memory again
                held.batch, held.own = _copied(held.batch), True
                held.versions = _versions(held.batch)
        try:
            if self.state != state:
                self.source.load_state(state)
            before = Draws.now(self.device)
            batch = a_batch(self.source).to(self.device)
            if len(self.readers) > 1 and before != Draws.now(self.device):
                raise Refused("source", DRAWS)
            self.state = copy.deepcopy(self.source.state())
        except Exception as error:
            self.failure = error
            raise
        self.batches += 1
        read = Held(state, self.state, batch, _versions(batch))
        if len(self.held) < HELD:
            self.held.append(read)
        return read

    def _drop(self) -> None:
        """Forget batches that no reader will ask for: those that it stands before, and those that follow them."""
        needed: list[Held] = []
        for state in [reader.position for reader in self.readers]:
            while (one := next((held for held in self.held if held.before == state), None)) is not None:
                if one in needed:
                    break
                needed.append(one)
                state = one.after
        self.held = [held for held in self.held if held in needed]

    def training_text(self, contexts: int, position: Any) -> tuple[Any, Any]:
        """`TrainsInModel.training_text`; what was asked last is not read again."""
        asked = json.dumps([contexts, position], sort_keys=True)
        if self.text[0] != asked:
            self.text = asked, self.source.training_text(contexts, position)  # type: ignore[attr-defined]
        text, after = self.text[1]
        return text, copy.deepcopy(after)

    def leave(self, readers: Collection[Reader]) -> None:
        """These readers will read no more."""
        self.readers = [one for one in self.readers if one not in readers]
        self._drop()

    def close(self) -> None:
        """Release what the source holds."""
        self.held.clear()
        if isinstance(self.source, Closable):
            self.source.close()


class Reader:
    """A `Source` with the abilities of the stream's, but for closing it."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.n_layers, self.d_model = stream.source.n_layers, stream.source.d_model
        self.position = stream.state
        """The state of the source from which the next batch is read."""
        if hasattr(stream.source, "training_text"):
            self.training_text = stream.training_text
        lend(stream.source, self, but={"close"})

    def next(self) -> Batch:
        held = self.stream.after(self.position)
        self.position = held.after
        return held.batch

    def held_out(self, tokens: int) -> Iterator[Batch]:
        return self.stream.source.held_out(tokens)

    def statistics(self) -> Mapping[str, Tensor] | None:
        return self.stream.source.statistics()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.position)

    def load_state(self, state: dict[str, Any]) -> None:
        """
        Raises:
            Refused: the state is of other data.
        """
        if state == self.position or any(state in (held.before, held.after) for held in self.stream.held):
            self.position = copy.deepcopy(state)
            return
        # The source itself says whether it can go there; what it makes of the state is what a run alone would save.
        self.stream.source.load_state(state)
        self.stream.state = copy.deepcopy(self.stream.source.state())
        self.position = self.stream.state


def _copied(batch: Batch) -> Batch:
    others = (None if x is None else x.clone() for x in (batch.token_ids, batch.positions))
    return Batch(batch.inputs.clone(), batch.targets.clone(), *others)


def _versions(batch: Batch) -> list[int]:
    tensors = (batch.inputs, batch.targets, batch.token_ids, batch.positions)
    return [x._version for x in tensors if x is not None and not x.is_inference()]
