"""AuxK: the dead features nearest to activity reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2).

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_losses.late import LATE, Late
from clt_losses.terms import of_weight, over_run
from clt_plugins import Context, Features, Forward, Top

LEAST = 1e-8
"""A residual of less than this share of the targets' mean square is none."""

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
    caches = ("late",)
    """A run that knows no counts yet, as after a resumption, looks at all features: the result is the same."""

    def __init__(self, config: AuxKConfig, context: Context):
        self.config = config
        self.k = config.k or max(1, context.d_model // 2)
        self.dead_after = context.dead_after_tokens
        self.batch_tokens = context.batch_tokens
        self.n_layers, self.n_features = context.n_layers, context.n_features
        self.kernels, self.parallel = context.kernels, context.parallel
        self.late = Late()
        self.schedule = of_weight(config.weight_schedule, context)

    def selection(self, tokens: int, idle_tokens: Tensor) -> Top | None:
        """Selects among the dead features alone; None while none is dead."""
        width = self._width(idle_tokens)
        if width == 0:
            return None
        columns, shift = _listed(idle_tokens >= self.dead_after, width)
        return Top(
            self.k,
            tokens,
            self.n_layers,
            self.n_features,
            per="token",
            affine=lambda layer, pre: (None, shift[layer]),
            columns=columns,
            kernels=self.kernels,
            parallel=self.parallel,
        )

    def _width(self, idle_tokens: Tensor) -> int:
        """How many features of a layer are looked at: at least as many as are dead; 0 where no rank has a dead one.

        On a CPU, that number. A GPU's host knows only what was true some steps ago: it counts the features that can be
        dead by now. So the result is exact, and the same for a run that was resumed and knows nothing yet: it looks at
        all. Powers of two, so that few sizes occur.
        """
        on_cpu = idle_tokens.device.type == "cpu"
        soon = idle_tokens >= self.dead_after - (0 if on_cpu else LATE * self.batch_tokens)
        most = soon.sum(1).max()
        known = self.late.exchange(torch.stack([most, self.parallel.total(most)]))
        if known is None:
            return idle_tokens.shape[1]
        here, anywhere = known
        if anywhere == 0:
            return 0
        # Ranks select together: one without dead features takes part.
        width = max(1, here)
        return width if on_cpu else min(idle_tokens.shape[1], 1 << (width - 1).bit_length())

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        extra = forward.extra
        if extra is None:
            zero = forward.inputs.new_zeros(())
            return {"auxk": zero, "auxk_pull": zero}
        share = forward.share()
        residual = (share.targets - share.reconstruction).detach()
        written = share.decode(Features(extra.values.relu(), extra.pairs))
        squares = [x.square().mean((0, 2)) for x in (written - residual, residual, share.targets)]
        error, power, of_targets = share.mean(torch.stack(squares))
        power, of_targets = self._mean(torch.stack([power, of_targets]).detach())
        # Where next to nothing is missing, dead features have nothing to learn: a gradient over next to 0 would be
        # without bound.
        missing = power > LEAST * of_targets
        # Where fewer than k features are dead, a GPU has empty pairs of value -inf. Without any dead feature all pairs
        # are empty: both terms are 0 then, as on a CPU.
        empty = extra.values == -torch.inf
        pre, count = forward.sum_features(
            torch.stack([extra.values.masked_fill(empty, 0).sum(), (~empty).sum().to(extra.values.dtype)])
        )
        pull = pre / (forward.features.shape[0] * self.k)
        unexplained = torch.where(missing, error / torch.where(missing, power, 1), 0).mean() * (count > 0)
        weight, of_pull = (over_run(self.schedule, forward, x) for x in (self.config.weight, self.config.pull))
        return {"auxk": weight * unexplained, "auxk_pull": -of_pull * pull}

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the data ranks, which have equal parts of the batch."""
        return self.parallel.total(x, over="tokens") / self.parallel.data_ranks


def _listed(dead: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The dead features of each layer, ascending: their numbers and what is added to their score, each [L, width].

    Places without one have the last feature and -inf. Nothing is read back.

    Args:
        dead: [L, F] bool; at most `width` of a layer are.
    """
    n_layers, n_features = dead.shape
    # The last column takes those that are not dead.
    place = torch.where(dead, dead.cumsum(1) - 1, width)
    number = torch.arange(n_features, device=dead.device).expand(n_layers, n_features)
    columns = number.new_zeros(n_layers, width + 1).scatter_(1, place, number)[:, :width]
    filled = torch.arange(width, device=dead.device) < dead.sum(1, keepdim=True)
    return columns.where(filled, n_features - 1), torch.where(filled, 0.0, -torch.inf)
