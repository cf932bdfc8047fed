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
    """Squared error between the detached residual and what the k best dead features write, over the residual's power.

    The k dead features with the highest pre-activation of each token come from the same encoder pass as its features.
    They pass a ReLU, as all features do, and the same (cross-layer) decoder without bias. So a feature whose
    pre-activation is negative at every token would learn nothing. Therefore a second term pulls the pre-activations
    themselves up, until the feature is alive.
    """

    needs_pre = False

    def __init__(self, config: AuxKConfig, context: Context):
        self.config = config
        self.k = config.k or max(1, context.d_model // 2)
        self.dead_after = context.dead_after_tokens
        self.n_layers, self.n_features = context.n_layers, context.n_features
        self.kernels, self.parallel = context.kernels, context.parallel

    def selection(self, tokens: int, idle_tokens: Tensor) -> Top | None:
        dead = idle_tokens >= self.dead_after
        # On a CPU, reading this number to skip the work costs nothing; on a GPU the step would wait for it.
        if dead.device.type == "cpu" and not bool(self.parallel.total(dead.sum()) > 0):
            return None
        shift = torch.where(dead, 0.0, -torch.inf)
        return Top(
            self.k,
            tokens,
            self.n_layers,
            self.n_features,
            per="token",
            affine=lambda layer, pre: (None, shift[layer]),
            kernels=self.kernels,
            parallel=self.parallel,
        )

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        residual = (forward.targets - forward.reconstruction).detach()
        extra = forward.extra
        if extra is None:
            return {"auxk": residual.new_zeros(()), "auxk_pull": residual.new_zeros(())}
        written = forward.decode(Features(extra.values.relu(), extra.pairs))
        error = (written - residual).square().mean((0, 2))
        power = self._mean(residual.square().mean((0, 2))).clamp_min(torch.finfo(residual.dtype).tiny)
        # Where fewer than k features are dead, a GPU has empty pairs of value -inf. Without any dead feature all pairs
        # are empty: both terms are 0 then, as on a CPU.
        empty = extra.values == -torch.inf
        pre, count = forward.sum_features(
            torch.stack([extra.values.masked_fill(empty, 0).sum(), (~empty).sum().to(extra.values.dtype)])
        )
        pull = pre / (residual.shape[0] * self.k)
        unexplained = (error / power).mean() * (count > 0)
        return {"auxk": self.config.weight * unexplained, "auxk_pull": -self.config.pull * pull}

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the data ranks, which have equal parts of the batch."""
        return self.parallel.total(x, over="tokens") / self.parallel.data_ranks
