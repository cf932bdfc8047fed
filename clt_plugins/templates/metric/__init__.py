"""The metric `example`: the mean absolute error of a training batch and of held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Batch, Context, Features, Scores, Step


@frozen(kw_only=True)
class ExampleConfig:
    """The mean over tokens and dimensions of |reconstruction − target|, in raw units, by layer."""


class Example:
    """A `Metric`. Its methods are called on every rank; it may read numbers back from the device."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.context = context

    def step(self, step: Step) -> Mapping[str, Any]:
        """Of one training step: this rank's mean over its tokens, and then the mean of all data ranks."""
        parallel = self.context.parallel
        error = step.units.raw(step.reconstruction - step.targets).abs().mean((0, 2))
        return {"train/example_by_layer": parallel.total(error, over="tokens") / parallel.data_ranks}

    def held_out(self) -> ExampleHeldOut:
        """A pass over held-out tokens begins."""
        return ExampleHeldOut(self.context)


class ExampleHeldOut:
    """A `HeldOut`: sums over batches. Ranks have seen other batches, perhaps fewer, so sums and counts are added up."""

    def __init__(self, context: Context):
        self.parallel = context.parallel
        self.error: Tensor | float = 0.0
        self.tokens = 0

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        """[B, L, D] in raw units."""
        self.error = self.error + (reconstruction - batch.targets).abs().double().mean(2).sum(0)
        self.tokens += batch.tokens

    def result(self, scores: Scores) -> Mapping[str, Any]:
        """Logged as `eval/example_by_layer`."""
        import torch

        # A rank may have seen no batch at all.
        error = torch.zeros_like(scores.nmse_by_layer, dtype=torch.float64) + torch.as_tensor(self.error).cpu()
        # The number of all tokens is among what the engine has measured.
        return {"example_by_layer": self.parallel.total(error, over="tokens") / scores.tokens}


@hookimpl
def clt_metrics() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
