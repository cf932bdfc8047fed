"""The stream of a sweep: many readers of one source, each of which reads what the source alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import Batch
from clt_plugins.errors import PluginError, Refused
from clt_plugins.model.assemble import build_source
from clt_plugins.training.sweep import stream as streams
from clt_plugins.training.sweep.stream import Stream
from tests.support.helpers import recipe


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("seed", range(4))
def test_readers_that_go_anywhere_read_what_a_source_alone_gives(seed):
    random = torch.Generator().manual_seed(seed)
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    readers, own = [stream.reader() for _ in range(3)], [build_source(recipe()) for _ in range(3)]
    states: list[list[dict[str, Any]]] = [[] for _ in range(3)]
    for _ in range(150):
        number, what = torch.randint(3, (1,), generator=random).item(), torch.rand(1, generator=random).item()
        if what < 0.75 or not states[number]:
            states[number].append(readers[number].state())
            assert equal(readers[number].next(), own[number].next())
        else:  # back to where it was, as a callback does that has looked ahead
            chosen = states[number][int(torch.randint(len(states[number]), (1,), generator=random))]
            readers[number].load_state(chosen)
            own[number].load_state(chosen)
        assert readers[number].state() == own[number].state()
        assert len(stream.held) <= streams.HELD


def test_in_turns_a_source_is_never_set_back():
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    readers = [stream.reader() for _ in range(3)]
    for _ in range(10):
        assert len({id(reader.next()) for reader in readers}) == 1
    assert stream.batches == 10 and len(stream.held) == 1


def test_a_batch_that_is_changed_in_place_is_refused():
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    first, second = stream.reader(), stream.reader()
    first.next().inputs.add_(1)
    with pytest.raises(PluginError, match="a batch was changed in place"):
        second.next()


def test_a_source_that_draws_from_torch_is_refused_unless_it_has_one_reader():
    source = build_source(recipe())
    real = source.next
    source.next = lambda: (torch.rand(1), real())[1]  # type: ignore[method-assign]
    stream = Stream(source, torch.device("cpu"))
    reader = stream.reader()
    reader.next()
    stream.reader()
    with pytest.raises(Refused, match="draws from torch's own generators"):
        reader.next()
