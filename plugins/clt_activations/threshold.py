"""Activations with thresholds: every pre-activation above its feature's threshold is a feature.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins import Above, Context, parameter

if TYPE_CHECKING:
    from clt_activations import JumpReLUConfig


class ReLU(nn.Module):
    """max(pre, 0)."""

    fixed_size = False

    def __init__(self, context: Context):
        super().__init__()
        self.shape = context.n_layers, len(context.parallel.shard(context.n_features))

    def threshold(self) -> Tensor:
        """0 for every feature, [L, F]."""
        return torch.zeros(self.shape)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        return Above(0.0, tokens, *self.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        return pre.relu()


class JumpReLU(nn.Module):
    """pre where pre > θ, else 0, with θ = exp(log_threshold) [L, F] learned by a straight-through estimator."""

    fixed_size = False

    def __init__(self, config: JumpReLUConfig, context: Context):
        super().__init__()
        self.bandwidth = config.bandwidth
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        # Thresholds stay in float32 at least: steps in bfloat16 would be rounded away.
        dtype = torch.promote_types(context.dtype, torch.float32)
        start = torch.full(shape, math.log(config.threshold), dtype=dtype, device=context.device)
        self.log_threshold = parameter(start, feature_axis=1)

    def threshold(self) -> Tensor:
        """θ, [L, F]."""
        return self.log_threshold.exp()

    def set_threshold(self, threshold: Tensor) -> None:
        """Set θ, [L, F], each at least 0."""
        with torch.no_grad():
            self.log_threshold.copy_(threshold.log())

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        # A pair just below its threshold has value 0, but its threshold gets a gradient: in training it is kept.
        margin = self.bandwidth / 2 if self.training and torch.is_grad_enabled() else 0.0
        return Above(self.threshold().detach() - margin, tokens, *self.log_threshold.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        threshold = self.threshold() if feature is None else self.log_threshold.flatten()[feature].exp()
        return _Jump.apply(pre, threshold.expand_as(pre), self.bandwidth)

    def active(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """1 where pre > θ, else 0."""
        threshold = self.threshold() if feature is None else self.log_threshold.flatten()[feature].exp()
        return _Step.apply(pre, threshold.expand_as(pre), self.bandwidth)


class _Jump(torch.autograd.Function):
    """pre where pre > θ, else 0. Its gradient by θ is -θ/ε where |pre - θ| < ε/2 (equation 11 of the paper), else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = torch.where(near, grad * threshold / -ctx.bandwidth, 0)
        return torch.where(pre > threshold, grad, 0), grad_threshold, None


class _Step(torch.autograd.Function):
    """1 where pre > θ, else 0. Its gradient by θ is -1/ε where |pre - θ| < ε/2, else 0; by pre it is 0 (equation 12 of
    the paper)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, torch.where(near, grad / -ctx.bandwidth, 0), None
