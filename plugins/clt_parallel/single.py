"""One process: every reduction is the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Single:
    """An `interfaces.Parallel` of one rank."""

    rank = tensor_rank = data_rank = 0
    world = tensor_ranks = data_ranks = 1

    def shard(self, features: int) -> range:
        return range(features)

    def sum_features(self, x: Tensor) -> Tensor:
        return x

    def total(self, x: Tensor) -> Tensor:
        return x.detach()

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Gradients are whole already."""

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def close(self) -> None:
        """There is no group to leave."""
