"""AuxK: the dead features nearest to activity reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2).

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import Context, Features, Forward, Top

if TYPE_CHECKING:
    from clt_losses import AuxKConfig


class AuxK:
    """Normalised squared error between the detached residual and what the k best dead features write.

    The dead features of a token are found in the same encoder pass as its features, decoded through the same
    (cross-layer) decoder without bias, and pass a ReLU as all features do. So one whose pre-activation is negative
    everywhere would learn nothing: a second term pulls the pre-activations themselves up, until the feature is alive.
    """

    needs_pre = False

    def __init__(self, config: AuxKConfig, context: Context):
        self.config = config
        self.k = config.k or max(1, context.d_model // 2)
        self.dead_after = context.dead_after_tokens
        self.n_layers, self.n_features = context.n_layers, context.n_features
        self.parallel = context.parallel

    def selection(self, tokens: int, idle_tokens: Tensor) -> Top | None:
        dead = idle_tokens >= self.dead_after
        # Reading the device to skip the work costs nothing on a CPU; on a GPU it would stop the step.
        if dead.device.type == "cpu" and not bool(self.parallel.total(dead.sum()) > 0):
            return None
        outside = torch.where(dead, 0.0, -torch.inf)

        def score(layer: int, pre: Tensor) -> Tensor:
            return pre + outside[layer].to(pre.dtype)

        return Top(self.k, tokens, self.n_layers, self.n_features, per="token", score=score, parallel=self.parallel)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        residual = (forward.targets - forward.reconstruction).detach()
        extra = forward.extra
        if extra is None:
            return {"auxk": residual.new_zeros(()), "auxk_pull": residual.new_zeros(())}
        written = forward.decode(Features(extra.values.relu(), extra.pairs))
        error = (written - residual).square().mean((0, 2))
        power = self._mean(residual.square().mean((0, 2))).clamp_min(torch.finfo(residual.dtype).tiny)
        reached = extra.values.masked_fill(extra.values == -torch.inf, 0)
        pull = forward.sum_features(reached.sum()) / (residual.shape[0] * self.k)
        return {"auxk": self.config.weight * (error / power).mean(), "auxk_pull": -self.config.pull * pull}

    def _mean(self, x: Tensor) -> Tensor:
        """Over the parts of the batch that other ranks have."""
        return self.parallel.total(x, over="tokens") / self.parallel.data_ranks
