"""A batch of activations, as every source yields it.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch


@attrs.frozen(eq=False)
class Batch:
    """MLP inputs and outputs of B tokens at every layer.

    Raises:
        ValueError: inputs and targets are not two tensors of the same shape [B, L, D].
    """

    inputs: torch.Tensor
    """What each MLP read, [B, L, D]."""
    targets: torch.Tensor
    """What each MLP wrote, [B, L, D]."""
    token_ids: torch.Tensor | None = None
    """The vocabulary id of each token, [B] int64, where the source knows it."""
    positions: torch.Tensor | None = None
    """The position of each token: (context, index in it), [B, 2] int64, where the source knows it."""

    def __attrs_post_init__(self) -> None:
        if self.inputs.dim() != 3 or self.inputs.shape != self.targets.shape:
            raise ValueError(
                f"a batch holds inputs and targets of one shape [tokens, layers, d_model], "
                f"got {tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            )

    @property
    def tokens(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on another device; asynchronous where the memory is pinned."""
        return attrs.evolve(
            self,
            inputs=self.inputs.to(device, dtype, non_blocking=True),
            targets=self.targets.to(device, dtype, non_blocking=True),
        )

    def rows(self, index: torch.Tensor | slice) -> Batch:
        """Some tokens of this batch, in the order of `index`; a mask or numbers may be on any device."""

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x[index if isinstance(index, slice) else index.to(x.device)]

        others = (None if x is None else pick(x) for x in (self.token_ids, self.positions))
        return Batch(pick(self.inputs), pick(self.targets), *others)


def mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """A batch of what a function makes of each tensor."""
    tensors = (batch.inputs, batch.targets, batch.token_ids, batch.positions)
    return Batch(*(None if x is None else change(x) for x in tensors))  # type: ignore[arg-type]


def last_rows(batch: Batch, count: int) -> Batch:
    """The last `count` tokens of a batch."""
    return batch.rows(slice(batch.tokens - count, None))


def joined(parts: Sequence[Batch], rows: int) -> Batch:
    """The first `rows` tokens of some batches, one after the other."""
    import torch

    parts = [part for part in parts if part.tokens]
    if len(parts) == 1:
        return parts[0].rows(slice(0, rows))
    names = ("inputs", "targets", "token_ids", "positions")
    columns = ([getattr(part, name) for part in parts] for name in names)
    return Batch(*(None if column[0] is None else torch.cat(column)[:rows] for column in columns))  # type: ignore[arg-type]
