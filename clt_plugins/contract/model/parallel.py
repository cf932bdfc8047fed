"""What `[parallel]` builds: the ranks of a run, and how features and tokens are split over them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Over = Literal["features", "tokens", "all"]
"""The ranks that a collective sums over."""


class Parallel(Protocol):
    """How features (tensor parallel) and tokens (data parallel) are split over ranks (processes).

    Every method but `shard` and `apart` is a collective: all ranks must call it, in the same order. `over` says which
    ranks take part: those that share the "features" of a batch, those that share the "tokens" of a feature, or "all".
    """

    rank: int
    world: int
    tensor_rank: int
    tensor_ranks: int
    data_rank: int
    data_ranks: int
    batch_rank: int
    batch_ranks: int
    """Which part of how many parts of a batch this rank has: data_rank of data_ranks; 0 of 1 within `apart`."""

    def shard(self, n_features: int) -> range:
        """The features of each layer that this rank owns, of F; the shards of ranks follow each other."""

    def sum_features(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share the features; the gradient passes through unchanged."""

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        """The same, started now; calling the result waits for the sum. What is computed in between overlaps."""

    def total(self, x: Tensor, over: Over = "features", what: str = "metrics") -> Tensor:
        """A detached sum over ranks. `what` names what `sent` counts the bytes as."""

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Average the gradients over the ranks that share the tokens; sum those of parameters that every tensor rank
        has all of but computes only a part of the gradient for (`parameter.partial_gradient`)."""

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""

    def apart(self) -> AbstractContextManager[None]:
        """A block in which batches are not split over ranks: each group that shares features has its own batch."""

    def sent(self) -> dict[str, int]:
        """Bytes that this rank sent since the start, by purpose."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group, after training; what rank 0 does then is its own. May be called again."""


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class SumsLater(Protocol):
    """A `Parallel` whose ranks can go on while a sum is under way; others wait for it at once."""

    def total_later(self, x: Tensor, over: Over = "features", what: str = "metrics") -> Callable[[], Tensor]:
        """`Parallel.total`, started now; calling the result waits for the sum."""


@runtime_checkable
class Sends(Protocol):
    """A `Parallel` whose ranks that share the features of a batch can each compute a part of what all of them need."""

    @property
    def connected(self) -> bool:
        """Whether there are other ranks: not in a plan, and not after `close`."""

    def send_later(self, x: Tensor, tensor_rank: int) -> Callable[[], None]:
        """Start to copy one rank's x into that of all that share features; calling the result waits for it."""


@runtime_checkable
class SplitsTokens(Protocol):
    """A `Parallel` whose ranks that share the features of a batch can split its tokens when they compute the error.

    Each rank then gets a share of the sum of what all ranks' features write, and gives a share of its gradient, in
    place of the whole sum: as many bytes, and the passes over [B, L, D] are split too.
    """

    splits_tokens: bool
    """Whether they do: not every network sums shares as fast as wholes."""

    def sum_share_later(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to sum x [B, ...] over the ranks that share the features; B is a multiple of their number. Calling the
        result waits for this rank's share of the sum, [B / tensor_ranks, ...], a tensor of its own; detached."""

    def join_shares(self, share: Tensor) -> Tensor:
        """The shares of all ranks, [B / tensor_ranks, ...] each, put together: [B, ...], in the order of ranks."""
