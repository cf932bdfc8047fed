"""A shift and a scale for each layer and dimension.

| choice | shift | scale |
| --- | --- | --- |
| `none` | 0 | 1 |
| `mean_std` | mean of each dimension | standard deviation of each dimension |
| `rms` | 0 | root of the mean square, one number per layer |
| `sqrt_d_model` | 0 | mean norm of a token / sqrt(D), one number per layer: the mean norm becomes sqrt(D) |

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import AffineNormalisation

if TYPE_CHECKING:
    from clt_plugins import Affine, Context

EPSILON = 1e-6
"""Added to standard deviations, as crosslayer-coding does, so that a constant dimension stays finite."""


class Nothing(AffineNormalisation):
    """Activations stay as they are, without a copy."""

    def __init__(self, context: Context):
        super().__init__(context, identity=True)


class MeanStd(AffineNormalisation):
    """(x - mean) / (standard deviation + EPSILON)."""

    needs = ("mean", "std")

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        for name, side in (("inputs", self.side("input")), ("targets", self.side("target"))):
            fit_mean_std(side, statistics, name)


class RMS(AffineNormalisation):
    """x / root mean square of the layer."""

    needs = ("rms",)

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        for name, side in (("inputs", self.side("input")), ("targets", self.side("target"))):
            # One number per layer: directions keep their relative size.
            side.scale.copy_(statistics[f"{name}.rms"][:, None].clamp_min(EPSILON).expand_as(side.scale))


class SqrtDModel(AffineNormalisation):
    """x · sqrt(D) / mean norm of the layer's tokens."""

    needs = ("norm",)

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        for name, side in (("inputs", self.side("input")), ("targets", self.side("target"))):
            # A layer that writes nothing has no norm.
            norm = statistics[f"{name}.norm"][:, None] * side.scale.shape[1] ** -0.5
            side.scale.copy_(norm.clamp_min(EPSILON).expand_as(side.scale))


def fit_mean_std(side: Affine, statistics: Mapping[str, Tensor], name: str) -> None:
    """Set the mean and the standard deviation of each dimension.

    Args:
        name: "inputs" or "targets".
    """
    side.shift.copy_(statistics[f"{name}.mean"])
    side.scale.copy_(deviations(statistics[f"{name}.std"]) + EPSILON)


def deviations(std: Tensor) -> Tensor:
    """Standard deviations [L, D]; of a dimension without one, the root mean square of those of its layer.

    A dimension that never varied among the tokens of the statistics has none: divided by almost 0, a first deviation in
    later data would be larger than everything else.
    """
    varies = std > 0
    square = std.square().sum(1, keepdim=True) / varies.sum(1, keepdim=True).clamp_min(1)
    # A layer that never varies stays at 0: errors are divided by its variance, which is 0 too.
    return torch.where(varies, std, square.sqrt())
