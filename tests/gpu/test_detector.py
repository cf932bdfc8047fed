"""The detector sees everything that makes the host wait for a GPU, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.absent import absent_gpu
from tests.gpu.watch import Watch


def _uses_if(x: Tensor) -> None:
    if x.sum() > 0:
        x.zero_()


WAITS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("reads a number", lambda x: x.sum().item()),
    "float": ("reads a number", lambda x: float(x.sum())),
    "int": ("reads a number", lambda x: int(x.argmax())),
    "bool": ("reads a number", lambda x: bool(x.any())),
    "if": ("reads a number", _uses_if),
    "range": ("reads a number", lambda x: x[0, : x.argmax()]),
    "cpu": ("copies to the host", lambda x: x.cpu()),
    "to cpu": ("copies to the host", lambda x: x.to("cpu")),
    "to cpu with a type": ("copies to the host", lambda x: x.to("cpu", torch.float64)),
    "copy_ to the host": ("copies to the host", lambda x: torch.empty(3, 4).copy_(x)),
    "copy_ to the host, not pinned": ("copies to the host", lambda x: torch.empty(3, 4).copy_(x, non_blocking=True)),
    "nonzero": ("size depends on data", lambda x: x.nonzero()),
    "nonzero as a tuple": ("size depends on data", lambda x: (x > 0).nonzero(as_tuple=True)),
    "where of one argument": ("size depends on data", lambda x: torch.where(x > 0)),
    "boolean index": ("size depends on data", lambda x: x[x > 0]),
    "boolean index of rows": ("size depends on data", lambda x: x[x.sum(1) > 0, 1:]),
    "assigned through a boolean index": ("size depends on data", lambda x: x.__setitem__(x > 0, x[0].repeat(3))),
    "masked_select": ("size depends on data", lambda x: x.masked_select(x > 0)),
    "unique": ("size depends on data", lambda x: x.unique()),
    "bincount": ("size depends on data", lambda x: x.flatten().long().bincount()),
    "repeat_interleave": ("size depends on data", lambda x: x[0].repeat_interleave(x[0].long())),
    "equal": ("size depends on data", lambda x: torch.equal(x, x + 1)),
    "a list becomes a tensor": ("copies from pageable memory", lambda x: torch.tensor([1.0, 2.0], device="cuda")),
    "a number becomes a tensor": ("copies from pageable memory", lambda x: torch.tensor(1.0, device=x.device)),
    "new_tensor": ("copies from pageable memory", lambda x: x.new_tensor([1.0, 2.0])),
    "a list as an index": ("copies from pageable memory", lambda x: x[[0, 2]]),
    "a pageable copy": ("copies from pageable memory", lambda x: torch.empty(3).to("cuda", non_blocking=True)),
    "cuda()": ("copies from pageable memory", lambda x: torch.empty(3).cuda()),
    "pinned, but waiting": ("copies from pageable memory", lambda x: torch.empty(3, pin_memory=True).to("cuda")),
    "copy_ from the host": ("copies from pageable memory", lambda x: x.copy_(torch.empty(3, 4))),
    "synchronize": ("waits", lambda x: torch.cuda.synchronize()),
    "synchronize a stream": ("waits", lambda x: torch.cuda.current_stream().synchronize()),
    "synchronize an event": ("waits", lambda x: torch.cuda.Event().synchronize()),
    "two devices": ("mixes devices", lambda x: x[0].clone().index_add_(0, torch.arange(4), x[0])),
}

ASYNCHRONOUS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic with a number": lambda x: x * 2 + 1,
    "a number on the host": lambda x: x * torch.tensor(2.0),
    "where": lambda x: torch.where(x > 0, 0.0, x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "a number through a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "an index on the device": lambda x: x[torch.arange(2, device="cuda")],
    "sort": lambda x: x.sort(stable=True),
    "nonzero_static": lambda x: torch.nonzero_static(x, size=5),
    "to where it is": lambda x: x.to("cuda"),
    "another type": lambda x: x.to(torch.bfloat16),
    "a pinned copy to the device": lambda x: torch.empty(3).pin_memory().to("cuda", non_blocking=True),
    "a pinned copy to the host": lambda x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True),
    "an event of two steps ago": lambda x: _two_steps_ago(),
    "an event is recorded": lambda x: torch.cuda.Event().record(),
    "a number of the host": lambda x: float(torch.zeros(())),
}


def _two_steps_ago() -> None:
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    assert isinstance(mode, Watch)
    event = torch.cuda.Event()
    event.record()
    mode.step += 2
    event.synchronize()


def _seen(action: Callable[[Tensor], object]) -> set[str]:
    with absent_gpu(Watch()) as watch:
        x = torch.empty(3, 4, device="cuda")
        assert not watch.events
        try:
            action(x)
        except RuntimeError:
            # What mixes devices fails, as it would on a GPU; it is noted before.
            assert watch.events
    return {kind for kind, _, _ in watch.events}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name):
    kind, action = WAITS[name]
    assert kind in _seen(action)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_what_does_not_wait_is_not(name):
    assert not _seen(ASYNCHRONOUS[name])


def test_what_waits_in_a_backward_pass_is_seen():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    with absent_gpu(Watch()) as watch:
        x = torch.empty(3, 4, device="cuda", requires_grad=True)
        Reads.apply(x).sum().backward()
        assert x.grad is not None and x.grad.device == torch.device("cuda:0")
    assert {kind for kind, _, _ in watch.events} == {"reads a number"}


def test_nothing_of_the_absent_gpu_stays():
    """A test after these, in the same process, has torch as it was."""
    available, generator = torch.cuda.is_available, torch.Generator
    with absent_gpu():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available is available and torch.Generator is generator
    assert torch.ones(2).sum() == 2
