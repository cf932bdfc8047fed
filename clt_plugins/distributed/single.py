"""One process, or one data rank of several that never speak to each other: every reduction is the identity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Single:
    """A `Parallel` that holds all features.

    Args:
        data_rank: which of `data_ranks` shares of the tokens a source is to read.
    """

    tensor_rank, tensor_ranks = 0, 1

    def __init__(self, data_rank: int = 0, data_ranks: int = 1):
        self.rank = self.data_rank = self.batch_rank = data_rank
        self.world = self.data_ranks = self.batch_ranks = data_ranks

    def shard(self, n_features: int) -> range:
        return range(n_features)

    def sum_features(self, x: Tensor) -> Tensor:
        return x

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        return x.detach()

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Gradients are complete already."""

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
