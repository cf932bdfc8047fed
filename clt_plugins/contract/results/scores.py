"""How well a transcoder does on held-out tokens.

NMSE (= FVU, fraction of variance unexplained) of a layer: mean squared error / variance of the targets, both means over
tokens and dimensions, in raw units. Explained variance: 1 - variance of the error / variance of the targets.

Shapes: L layers, D d_model, F features per layer, of all ranks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(kw_only=True, eq=False)
class Scores:
    """A transcoder's scores on some tokens.

    NMSE and explained variance of a layer are NaN where they are not defined; `undefined` says why.
    """

    tokens: int
    """How many tokens were scored."""
    nmse: float
    """Mean over the layers where it is defined; NaN if there is none."""
    explained_variance: float
    """Mean over the same layers as `nmse`."""
    l0: float
    """Active features per token, sum over layers."""
    dead_fraction: float
    """Share of features that were active at none of the tokens."""
    nmse_by_layer: Tensor
    """[L] float32."""
    explained_variance_by_layer: Tensor
    """[L] float32."""
    l0_by_layer: Tensor
    """Active features per token, [L] float32."""
    dead_fraction_by_layer: Tensor
    """[L] float32."""
    density: Tensor
    """The share of tokens at which each feature is active, [L, F] float32."""
    target_mean: Tensor
    """The mean of the raw targets, [L, D] float64."""
    undefined: dict[int, str] = attrs.field(factory=dict)
    """Layers without NMSE and explained variance, and why."""

    def as_metrics(self) -> dict[str, Any]:
        """What loggers get: numbers, [L] and [L, F], by name."""
        left_out = ("tokens", "target_mean", "undefined")
        return {a.name: getattr(self, a.name) for a in attrs.fields(Scores) if a.name not in left_out}

    def notes(self) -> list[str]:
        """A line for each layer without a score."""
        return [
            f"layer {layer} has no NMSE and is left out of the mean: {why}" for layer, why in self.undefined.items()
        ]
