"""From activations to stored rows and back: number types, their rounding errors, and moments for the statistics.

Shapes: R rows, L layers, D d_model.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch
from torch import Tensor

from clt_plugins import Refused

SLAB = 1024
"""Rows that are converted to float64 at a time."""
GRID = 8
"""How many scales are tried for int8."""


@attrs.frozen(eq=False)
class Encoded:
    """One side (inputs or targets) of a chunk."""

    values: np.ndarray
    """[R, L, D], in the stored type."""
    scale: np.ndarray
    """Activation per stored unit, [L] float32; 1 except for int8."""
    moments: np.ndarray
    """Mean, and sum of squared deviations from it, of the activations before rounding: [2, L, D] float64."""
    errors: np.ndarray
    """Sum of squared rounding errors, [L] float64."""


def encode(x: Tensor, dtype: str) -> Encoded:
    """Encode activations [R, L, D].

    Raises:
        Refused: an activation is not finite, or does not fit into the type.
    """
    for layer, finite in enumerate(torch.isfinite(x).all(-1).all(0).tolist()):
        if not finite:
            raise Refused("source", f"an activation of layer {layer} is not a finite number: try another model.dtype")
    scale = torch.ones(x.shape[1])
    if dtype == "int8":
        scale = _int8_scale(x)
        values = (x.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    else:
        values = x.to(getattr(torch, dtype)).contiguous()
        if not bool(torch.isfinite(values).all()):
            largest = float(x.abs().max())
            raise Refused("--dtype", f"activations reach {largest:g}, which {dtype} cannot hold: use bfloat16")
    # Two passes, since float64 sums of squares about zero would lose digits where a mean is large.
    moments = torch.zeros(2, *x.shape[1:], dtype=torch.float64)
    errors = torch.zeros(x.shape[1], dtype=torch.float64)
    for slab in _slabs(x):
        moments[0] += slab.double().sum(0)
    moments[0] /= len(x)
    for slab, stored in zip(_slabs(x), _slabs(values), strict=True):
        exact = slab.double()
        moments[1] += (exact - moments[0]).square().sum(0)
        if stored.dtype != slab.dtype:
            errors += (decode(stored, scale).double() - exact).square().sum((0, 2))
    return Encoded(as_numpy(values), scale.numpy(), moments.numpy(), errors.numpy())


def decode(values: Tensor, scale: Tensor) -> Tensor:
    """Stored values [R, L, D] as activations; int8 becomes float32, other types stay."""
    return values * scale[:, None] if values.dtype == torch.int8 else values


def as_numpy(x: Tensor) -> np.ndarray:
    """The same memory as an array; NumPy has no bfloat16, so it becomes the uint16 with the same bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _int8_scale(x: Tensor) -> Tensor:
    """The scale of each layer with the smallest squared error, [L].

    A smaller scale clips the largest values, but its steps are finer for all others: powers of sqrt(1/2) are tried.
    """
    sample = x[:: max(1, len(x) // 512)].float()
    largest = x.abs().amax((0, 2)).float().clamp_min(1e-30)
    best, scale = torch.full_like(largest, torch.inf), largest / 127
    for halving in range(GRID):
        tried = largest / 127 * 2.0 ** (-halving / 2)
        stored = (sample / tried[:, None]).round_().clamp_(-127, 127)
        error = (stored * tried[:, None] - sample).square().sum((0, 2))
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    return scale


def _slabs(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(SLAB)
