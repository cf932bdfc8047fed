"""From activations to stored rows and back: types, their rounding errors, and moments for the statistics.

Shapes: R rows, L layers, D d_model.
"""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

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
    """Activation per stored unit, [L] float32; 1 but for int8."""
    moments: np.ndarray
    """Mean, and sum of squared deviations from it, of the activations before rounding: [2, L, D] float64."""
    errors: np.ndarray
    """Sum of squared rounding errors, [L] float64."""


def encode(x: Tensor, dtype: str) -> Encoded:
    """Encode activations [R, L, D].

    Raises:
        ValueError: an activation is not finite, or does not fit into the type.
    """
    for layer, finite in enumerate(torch.isfinite(x).all(-1).all(0).tolist()):
        if not finite:
            raise ValueError(f"an activation of layer {layer} is not a finite number")
    scale = torch.ones(x.shape[1])
    if dtype == "int8":
        scale = _int8_scale(x)
        values = (x.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    else:
        values = x.to(getattr(torch, dtype)).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"activations reach {float(x.abs().max()):g}, which {dtype} cannot hold: use bfloat16")
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
    kept = values.view(torch.uint16) if dtype == "bfloat16" else values
    return Encoded(kept.numpy(), scale.numpy(), moments.numpy(), errors.numpy())


def decode(values: Tensor, scale: Tensor) -> Tensor:
    """Stored values [R, L, D] as activations; int8 becomes float32, other types stay."""
    return values * scale[:, None] if values.dtype == torch.int8 else values


def _int8_scale(x: Tensor) -> Tensor:
    """The scale of each layer with the least squared error, [L], among some that clip more or less of the largest
    values: the error of a few clipped outliers against that of coarse steps for all others."""
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


def merge(parts: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared deviations of several chunks together: [..., L, D] each (Chan et al. 1979).

    Args:
        parts: rows and moments [..., 2, L, D] of each chunk.
    """
    count = 0
    mean: Any = np.float64(0)
    second: Any = np.float64(0)
    for rows, moments in parts:
        shift = moments[..., 0, :, :] - mean
        total = count + rows
        second = second + moments[..., 1, :, :] + shift**2 * (count * rows / total)
        mean = mean + shift * (rows / total)
        count = total
    return np.asarray(mean), np.asarray(second)


def statistics(parts: list[tuple[int, np.ndarray]], errors: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a source's `statistics()` gives, and the stored type's NMSE by side and layer.

    Args:
        parts: rows and moments [2 (side), 2, L, D] of each chunk.
        errors: squared rounding errors of all rows, [2 (side), L].

    Raises:
        ValueError: fewer than two rows.
    """
    rows = sum(count for count, _ in parts)
    if rows < 2:
        raise ValueError(f"a data set needs at least 2 tokens to train on, got {rows}")
    mean, second = merge(parts)
    found: dict[str, Tensor] = {}
    nmse: dict[str, list[float]] = {}
    for number, side in enumerate(("inputs", "targets")):
        found[f"{side}.mean"] = torch.from_numpy(mean[number].copy())
        found[f"{side}.std"] = torch.from_numpy(np.sqrt(second[number] / (rows - 1)))
        found[f"{side}.rms"] = torch.from_numpy(np.sqrt((second[number] / rows + mean[number] ** 2).mean(-1)))
        nmse[side] = (errors[number] / np.maximum(second[number].sum(-1), 1e-300)).tolist()
    return found, nmse
