"""The parallel choice `example`: features are split evenly over the processes that `torchrun` starts, over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Every process has a part of the features of each layer; one process alone has them all."""

    timeout_s: float = field(default=600.0, validator=validators.gt(0))
    """A process that others wait for longer than so many seconds counts as dead."""


class Example:
    """A `Parallel` of tensor ranks only: every rank reads the same tokens."""

    data_rank, data_ranks = 0, 1
    batch_rank, batch_ranks = 0, 1

    def __init__(self, rank: int, world: int, connected: bool):
        self.rank = self.tensor_rank = rank
        self.world = self.tensor_ranks = world
        self.connected = connected
        self.bytes: dict[str, int] = {}

    def shard(self, n_features: int) -> range:
        """The features of each layer that this rank has, of F."""
        if n_features < self.world:
            raise Refused("transcoder.features", f"{n_features} cannot be split among {self.world} ranks")
        return range(self.rank * n_features // self.world, (self.rank + 1) * n_features // self.world)

    def sum_features(self, x: Tensor) -> Tensor:
        """The sum over ranks. Its gradient passes unchanged: (x - x.detach()) is zero and has the gradient of x."""
        return self.total(x) + (x - x.detach())

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        """The same for a caller that computes something else before it needs the sum. This one starts no earlier."""
        return lambda: self.sum_features(x)

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        """The sum over ranks, detached. A sum over "tokens" is complete already: every rank has all tokens."""
        import torch.distributed as dist

        whole = x.detach().clone()
        if self.connected and over != "tokens":
            self.bytes[what] = self.bytes.get(what, 0) + whole.numel() * whole.element_size()
            dist.all_reduce(whole)
        return whole

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Gradients of a rank's features are complete, and so are those that come from the reconstruction. Parameters
        with `partial_gradient` are whole on every rank but their gradient is not: it is added up."""
        for parameter in parameters:
            if getattr(parameter, "partial_gradient", False) and parameter.grad is not None:
                parameter.grad.copy_(self.total(parameter.grad, what="gradients"))

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        import torch.distributed as dist

        texts: list[Any] = [text] * self.world
        if self.connected:
            dist.all_gather_object(texts, text)
        return texts

    def apart(self) -> AbstractContextManager[None]:
        """Batches are not split over ranks here, so there is nothing to change."""
        return nullcontext()

    def sent(self) -> dict[str, int]:
        """Bytes that this rank gave to sums so far, by what they were for."""
        return dict(self.bytes)

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch

        self.total(torch.zeros(1))

    def close(self) -> None:
        """Leave the group; called again, it does nothing."""
        import torch.distributed as dist

        if self.connected:
            self.connected = False
            dist.destroy_process_group()


def build(config: ExampleConfig, context: Context) -> Example:
    """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; `torchrun` sets them."""
    from datetime import timedelta

    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # On the device "meta" only sizes are asked for: it must not wait for other processes.
    connected = world > 1 and context.device.type != "meta"
    if connected:
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.timeout_s))
    return Example(rank, world, connected)


@hookimpl
def clt_parallel() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
