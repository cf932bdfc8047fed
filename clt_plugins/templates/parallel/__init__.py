"""The parallel choice `example`: features cut evenly over the processes that `torchrun` started, over gloo."""

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
    """Every process owns a part of the features of each layer; one process alone owns them all."""

    timeout_s: float = field(default=600.0, validator=validators.gt(0))
    """A process that keeps the others waiting longer than so many seconds counts as dead."""


class Example:
    data_rank, data_ranks = 0, 1  # tokens are not split
    batch_rank, batch_ranks = 0, 1

    def __init__(self, rank: int, world: int):
        self.rank = self.tensor_rank = rank
        self.world = self.tensor_ranks = world
        self.bytes: dict[str, int] = {}

    def shard(self, n_features: int) -> range:
        """The features of each layer that this rank owns, of F."""
        if n_features < self.world:
            raise Refused("transcoder.features", f"{n_features} cannot be split among {self.world} ranks")
        return range(self.rank * n_features // self.world, (self.rank + 1) * n_features // self.world)

    def sum_features(self, x: Tensor) -> Tensor:
        """The sum over ranks. By this rank's part, the gradient of a sum is the sum's own: it passes unchanged."""
        return self.total(x) + (x - x.detach())

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        """The same, for a caller that has something else to do meanwhile; here the sum is not begun early."""
        return lambda: self.sum_features(x)

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        """The sum over ranks, detached. All ranks share features; a rank's tokens are everybody's."""
        import torch.distributed as dist

        whole = x.detach().clone()
        if self.world > 1 and over != "tokens":
            self.bytes[what] = self.bytes.get(what, 0) + whole.numel() * whole.element_size()
            dist.all_reduce(whole)
        return whole

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Gradients of a rank's own features are whole, and so are those that come from the reconstruction."""

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        import torch.distributed as dist

        texts: list[Any] = [text] * self.world
        if self.world > 1:
            dist.all_gather_object(texts, text)
        return texts

    def apart(self) -> AbstractContextManager[None]:
        """Batches are not split anyway."""
        return nullcontext()

    def sent(self) -> dict[str, int]:
        """Bytes given to sums so far, by what they were for."""
        return dict(self.bytes)

    def barrier(self) -> None:
        import torch

        self.total(torch.zeros(1))

    def close(self) -> None:
        import torch.distributed as dist

        if self.world > 1:
            dist.destroy_process_group()


def build(config: ExampleConfig, context: Context) -> Example:
    """Joins the group; `torchrun` says by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where it is."""
    from datetime import timedelta

    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.timeout_s))
    return Example(rank, world)


@hookimpl
def clt_parallel() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
