"""The metric `coverage`: how many features a batch uses, and how unevenly held-out text uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Batch, Context, Features, Scores, Step


@frozen(kw_only=True)
class CoverageConfig:
    """Of each logged step: `coverage/features`, how many different features are active in the batch, also by layer.
    Of each held-out pass: `eval/gini`, the Gini coefficient of the densities x of all features, also by layer:
    2 * sum_i i * x_i / (n * sum_i x_i) - (n + 1) / n with x ascending; 0 is even, near 1 is few features."""


def gini(densities: Tensor) -> Tensor:
    """Of the last axis; 0 where nothing is active."""
    import torch

    x, n = densities.double().sort().values, densities.shape[-1]
    ranks = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    total = x.sum(-1)
    return torch.where(total > 0, 2 * (ranks * x).sum(-1) / (n * total.clamp_min(1e-30)) - (n + 1) / n, 0.0)


class Coverage:
    """A `Metric`, and the `HeldOut` of each pass: the engine measures densities itself."""

    def __init__(self, config: CoverageConfig, context: Context):
        self.parallel = context.parallel

    def step(self, step: Step) -> Mapping[str, Any]:
        """`step.counts` is of all data ranks already; features are added up here."""
        layers = self.parallel.total((step.counts > 0).sum(1))
        return {"coverage/features": layers.sum(), "coverage/features_by_layer": layers}

    def held_out(self) -> Coverage:
        return self

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        """Nothing."""

    def result(self, scores: Scores) -> Mapping[str, Any]:
        return {"gini": gini(scores.density.flatten()), "gini_by_layer": gini(scores.density)}


@hookimpl
def clt_metrics() -> list[Spec]:
    return [Spec("coverage", CoverageConfig, Coverage)]
