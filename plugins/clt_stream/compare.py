"""Whether activations are the same, or multiples of each other, but for rounding.

Shapes: B sequences, T tokens, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred(value: Tensor) -> Tensor:
    """[B, T, D] in float64 without the mean over tokens."""
    rows = value.double().flatten(0, 1)
    return rows - rows.mean(0)


def multiple(value: Tensor, of: Tensor) -> tuple[float, Tensor]:
    """The factor by which one is a multiple of the other, and what remains."""
    value, of = value.double().reshape(of.shape), of.double()
    scale = float((value * of).sum() / of.square().sum().clamp(min=1e-300))
    return scale, value - scale * of


def rounding(remainder: Tensor, *summands: Tensor) -> bool:
    """Whether a remainder comes from rounding: a sum of these numbers was rounded a few times.

    Each rounding is at most half of eps, in proportion to a partial sum, and that to the largest of the numbers; four
    of them in the worst case, most of them far less.
    """
    eps = torch.finfo(summands[0].dtype).eps
    size = torch.stack([value.double().abs().reshape(remainder.shape) for value in summands]).sum(0)
    size = size + size.mean() * 1e-3  # where all happen to be close to zero
    return bool((remainder / (4 * eps * size)).square().mean() <= 1)


def near(one: Tensor, two: Tensor) -> bool:
    """Whether rows are the same but for sums in another order."""
    tolerance = max(4 * torch.finfo(one.dtype).eps, 2e-5)
    return bool((one.double() - two.double()).norm() <= tolerance * two.double().norm())
