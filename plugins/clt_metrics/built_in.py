"""The default metrics: numbers of a training step, and the scores of a held-out pass.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins import Batch, Context, Features, HeldOut, Scores, Step


class Training:
    """A `Metric`: losses, error, sparsity and the optimizer's numbers of one step."""

    def __init__(self, context: Context):
        self.context = context

    def step(self, step: Step) -> Mapping[str, Any]:
        context, parallel = self.context, self.context.parallel

        def mean(x: Tensor) -> Tensor:
            return parallel.total(x, over="tokens") / parallel.data_ranks

        # In raw units, as the held-out NMSE is: normalisation must not change what is reported.
        error = step.units.raw(step.reconstruction - step.targets).square().mean((0, 2))
        nmse = (mean(error) / step.variance).float().cpu()
        dead = parallel.total((step.idle_tokens >= context.dead_after_tokens).sum())
        active = float(parallel.total(step.counts.sum()))
        return {
            **{f"loss/{name}": float(mean(value)) for name, value in step.terms.items()},
            "loss/total": float(mean(step.total)),
            "train/nmse": float(nmse.mean()),
            "train/nmse_by_layer": nmse,
            "train/l0": active / (step.targets.shape[0] * parallel.data_ranks),
            "train/dead_fraction": float(dead) / (context.n_layers * context.n_features),
            "optim/lr": step.rate,
            "optim/grad_norm": float(step.gradient_norm),
        }

    def held_out(self) -> None:
        """Nothing: see `HeldOutScores`."""


class HeldOutScores:
    """A `Metric`: what the engine measures on held-out tokens in any case."""

    def step(self, step: Step) -> Mapping[str, Any]:
        return {}

    def held_out(self) -> HeldOut:
        return _AsMeasured()


class _AsMeasured:
    """A `HeldOut` that needs nothing of its own."""

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        """The engine adds it up."""

    def result(self, scores: Scores) -> Mapping[str, Any]:
        return scores.as_metrics()
