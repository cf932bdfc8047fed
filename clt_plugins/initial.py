"""First values of parameters: the same numbers on every device and for every number of ranks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clt_plugins.spec import Context


def uniform(name: str, shape: tuple[int, ...], bound: float, context: Context, feature_axis: int) -> Tensor:
    """Numbers of U(-bound, bound) for this rank's features.

    They are drawn on the CPU for all F features, from a generator that depends on the run's seed and `name` only,
    and then cut, so that a rank of many starts with the rows that a single process would have.

    Args:
        shape: of the whole, with F at `feature_axis`.
    """
    if context.device.type == "meta":
        shape = (*shape[:feature_axis], len(context.parallel.shard(shape[feature_axis])), *shape[feature_axis + 1 :])
        return torch.empty(shape, dtype=context.dtype, device="meta")
    digest = hashlib.blake2b(f"{context.seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    dtype = torch.float64 if context.dtype == torch.float64 else torch.float32
    whole = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    own = context.parallel.shard(shape[feature_axis])
    return whole.narrow(feature_axis, own.start, len(own)).to(context.device, context.dtype).contiguous()


def parameter(value: Tensor, feature_axis: int | None) -> nn.Parameter:
    """A parameter that says which of its axes counts features; None if it is whole on every rank."""
    made = nn.Parameter(value)
    made.feature_axis = feature_axis  # type: ignore[attr-defined]
    return made
