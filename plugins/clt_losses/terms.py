"""Losses that read one forward pass: reconstruction, sparsity and dead-feature pressure.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt_losses import penalty_weight
from clt_plugins import Context, Forward, build

if TYPE_CHECKING:
    from clt_losses import MSEConfig, PreactivationConfig, TanhSparsityConfig
    from clt_plugins import Schedule, Selected


def of_weight(chosen: Selected | None, context: Context) -> Schedule | None:
    """The schedule of a weight; None if it is constant."""
    return None if chosen is None else build(chosen, context)


def over_run(schedule: Schedule | None, forward: Forward, weight: float) -> float:
    """A weight in this step; constant without a schedule."""
    return weight if schedule is None else schedule(forward.step, forward.steps, weight)


class Term:
    """A loss without a selection of its own."""

    needs_pre = False

    def selection(self, tokens: int, idle_tokens: Tensor) -> None:
        return None


class MSE(Term):
    """Sum over layers of the mean squared error over tokens and dimensions, in raw units or over the variance."""

    def __init__(self, config: MSEConfig):
        self.config = config

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        share = forward.share()
        tokens, _, d_model = share.targets.shape
        total = squared_error(share.reconstruction, share.targets, error_scale(forward, self.config.scale))
        return {"mse": share.mean(self.config.weight * total / (tokens * d_model))}


def error_scale(forward: Forward, scale: Literal["variance", "raw"]) -> Tensor:
    """What an error in normalised units is multiplied by: [L, D], or a matrix for each layer [L, D, D].

    Args:
        scale: to raw units, and with "variance" over the square root of each layer's variance.
    """
    to_raw = forward.units.scale
    return to_raw if scale == "raw" else to_raw / forward.variance.sqrt().view(-1, *[1] * (to_raw.dim() - 1))


def squared_error(reconstruction: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Sum of ((reconstruction - targets) · scale)², a scalar; differentiable in the reconstruction [B, L, D]."""
    return _SquaredError.apply(reconstruction, targets, scale)


class _SquaredError(torch.autograd.Function):
    """Sum of ((reconstruction - targets) · scale)², a scalar; targets [B, L, D] and scale are constants. The scale is
    [L, D], or a matrix for each layer, [L, D, D].

    Written by hand: kept for the gradient is the scaled error, one [B, L, D]; autograd would keep several.
    Each row is summed first, so that a sum of millions of terms loses no digits.
    """

    @staticmethod
    def forward(ctx, reconstruction, targets, scale):
        error = reconstruction - targets
        error = error.mul_(scale) if scale.dim() == 2 else torch.einsum("bld,lde->ble", error, scale)
        ctx.save_for_backward(error, scale)
        return torch.linalg.vector_norm(error, dim=-1).square().sum()

    @staticmethod
    def backward(ctx, grad):
        error, scale = ctx.saved_tensors
        slope = scale.mul(2 * grad)
        # Not in place: a second backward pass reads the error again.
        return error * slope if scale.dim() == 2 else torch.einsum("ble,lde->bld", error, slope), None, None


class TanhSparsity(Term):
    """λ · mean over tokens of Σ tanh(c · ‖decoder‖ · activation); no gradient reaches the decoder norms.

    What a feature costs jumps from 0 to tanh(c · ‖decoder‖ · θ) at a threshold θ. A threshold's gradient is a
    straight-through estimate of the jump's: nearly all of it while tanh is linear there, and half of it where tanh is
    saturated, as below θ the activation is 0. The steered weight makes up for that where L0 has a target.
    """

    steered = ("tanh_sparsity",)

    def __init__(self, config: TanhSparsityConfig, context: Context):
        self.config = config
        self.weight = penalty_weight(config.weight, context)
        self.schedule: Schedule = build(config.weight_schedule, context)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        features = forward.features
        norms = features.per_feature(forward.norms().to(features.values.dtype))
        total = (forward.active() * torch.tanh(self.config.c * norms * features.values)).sum()
        mean = forward.sum_features(total) / features.shape[0]
        return {"tanh_sparsity": self.schedule(forward.step, forward.steps, self.weight) * mean}


class Preactivation(Term):
    """Mean over tokens and features of relu(-pre); with scope "dead", 0 for features that are not dead."""

    needs_pre = True

    def __init__(self, config: PreactivationConfig, context: Context):
        self.config = config
        self.dead_after = context.dead_after_tokens
        self.total_features = context.n_layers * context.n_features
        self.schedule = of_weight(config.weight_schedule, context)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        assert forward.pre is not None
        below = (-forward.pre).relu()
        if self.config.scope == "dead":
            below = below * (forward.idle_tokens >= self.dead_after)
        mean = forward.sum_features(below.sum()) / (below.shape[0] * self.total_features)
        return {"preactivation": over_run(self.schedule, forward, self.config.weight) * mean}
