"""One process: every reduction is the identity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Single:
    """An `interfaces.Parallel` of one rank."""

    rank = tensor_rank = data_rank = batch_rank = 0
    world = tensor_ranks = data_ranks = batch_ranks = 1

    def shard(self, features: int) -> range:
        return range(features)

    def sum_features(self, x: Tensor) -> Tensor:
        return x

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        return x.detach()

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Gradients are whole already."""

    def gather(self, text: str) -> list[str]:
        return [text]

    def apart(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sent(self) -> dict[str, int]:
        return {}

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def close(self) -> None:
        """There is no group to leave."""
