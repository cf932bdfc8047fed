"""Penalties on how many features are active: on L0, and on how often each feature is.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from clt_losses import penalty_weight
from clt_losses.terms import Term, of_weight, over_run
from clt_plugins import Context, Forward

if TYPE_CHECKING:
    from clt_losses import L0Config


class L0(Term):
    """λ L0, or λ (L0 / target - 1)²; and what features that are active too often add.

    The number of active features has a gradient by thresholds alone (the straight-through estimator of
    Rajamanoharan et al. 2024). L0 is that of the whole batch: of all ranks together, while each rank's gradient is that
    of its own tokens.
    """

    def __init__(self, config: L0Config, context: Context):
        self.config = config
        self.parallel = context.parallel
        self.schedule = of_weight(config.weight_schedule, context)
        own = 1.0 if config.target is not None and config.weight is None else config.weight
        self.weight = penalty_weight(own, context)
        self.steered = ("l0",) if config.target is None else ()

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        frequency = self._frequency(forward)
        weight = over_run(self.schedule, forward, self.weight)
        l0 = forward.sum_features(frequency.sum())
        if self.config.target is None:
            terms = {"l0": weight * self._of_all(l0)}
        else:
            terms = {"l0": weight * (self._of_all(l0) / self.config.target - 1).square()}
        if self.config.frequency_weight:
            excess = (self._of_all(frequency) / self.config.frequency_above - 1).relu().square()
            factor = over_run(self.schedule, forward, self.config.frequency_weight)
            terms["frequency"] = factor * forward.sum_features(excess.sum())
        return terms

    def _frequency(self, forward: Forward) -> Tensor:
        """At which share of this rank's tokens each of its features is active, [L, F]; differentiable."""
        active, features = forward.active(), forward.features
        tokens, n_layers, n_features = features.shape
        if features.pairs is None:
            return active.mean(0)
        counts = active.new_zeros(n_layers * n_features).index_add(0, features.pairs.feature, active)
        return counts.view(n_layers, n_features) / tokens

    def _of_all(self, x: Tensor) -> Tensor:
        """The mean over data ranks, with the gradient of this rank's part: gradients are averaged over ranks later."""
        if self.parallel.data_ranks == 1:
            return x
        mean = self.parallel.total(x.detach(), over="tokens") / self.parallel.data_ranks
        return x + (mean - x.detach())
