"""Activations with thresholds: every pre-activation above its feature's threshold is a feature.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins import Above, Context, Refused, parameter

if TYPE_CHECKING:
    from clt_activations import JumpReLUConfig, ReLUConfig

GAIN = 0.15
"""How far all thresholds follow L0 in a step, with a target: log θ by this much of log(L0 / target). L0 falls by some 2
to 4 times as much as thresholds rise, so an error is halved in 2 steps, and the noise of a batch moves them little."""
FAR = 2.0
"""The largest error that counts, as a logarithm."""


def check_target(config: ReLUConfig, context: Context) -> None:
    """Refuse an L0 that no transcoder of this size can have.

    Raises:
        Refused: it is more than all features.
    """
    features = context.n_layers * context.n_features
    if config.target_l0 is not None and config.target_l0 > features:
        raise Refused("activation.target_l0", f"{config.target_l0:g} is more than the {features} features: lower it")


class ReLU(nn.Module):
    """max(pre, 0).

    Raises:
        Refused: the target is more than all features.
    """

    fixed_size = False

    def __init__(self, config: ReLUConfig, context: Context):
        super().__init__()
        check_target(config, context)
        self.config = config
        self.shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.at_first = context.n_layers * context.n_features / 2
        """Half of all features, which are active at first."""

    def target_l0(self, progress: float) -> float | None:
        """What the weights of penalties are steered to. A target far below L0 would make them so high that features die
        before they have learned anything."""
        target = self.config.target_l0
        if target is None:
            return None
        return target * (max(1.0, self.at_first / target)) ** max(0.0, 1 - progress / self.config.anneal_over)

    def threshold(self) -> Tensor:
        """0 for every feature, [L, F]."""
        return torch.zeros(self.shape)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        return Above(0.0, tokens, *self.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        return pre.relu()


class JumpReLU(nn.Module):
    """pre where pre > θ, else 0, with θ = exp(log_threshold) [L, F] learned by a straight-through estimator.

    Its window is bandwidth · θ wide, so that it has a meaning of its own in whatever units pre-activations are: by
    log θ, the estimate of a count's gradient is -1 / bandwidth for each token in the window.

    Raises:
        Refused: the target is more than all features.
    """

    fixed_size = False

    def __init__(self, config: JumpReLUConfig, context: Context):
        super().__init__()
        check_target(config, context)
        self.config = config
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        # Thresholds stay in float32 at least: steps in bfloat16 would be rounded away.
        dtype = torch.promote_types(context.dtype, torch.float32)
        start = torch.full(shape, math.log(config.threshold), dtype=dtype, device=context.device)
        self.log_threshold = parameter(start, feature_axis=1, lr_factor=config.lr_factor)

    def target_l0(self, progress: float) -> float | None:
        """What thresholds follow, and the weights of penalties are steered to."""
        if self.config.target_l0 is None:
            return None
        left = max(0.0, 1 - progress / self.config.anneal_over)
        return self.config.target_l0 * (1 + (self.config.anneal_from - 1) * left)

    def follow(self, excess: Tensor) -> None:
        """Multiply all thresholds by exp(excess) ^ GAIN: about (L0 / target) ^ GAIN."""
        if self.log_threshold.requires_grad:  # not frozen
            with torch.no_grad():
                self.log_threshold.add_(excess.clamp(-FAR, FAR).mul(GAIN).to(self.log_threshold.dtype))

    def threshold(self) -> Tensor:
        """θ, [L, F]."""
        return self.log_threshold.exp()

    def set_threshold(self, threshold: Tensor) -> None:
        """Set θ, [L, F], each at least 0."""
        with torch.no_grad():
            self.log_threshold.copy_(threshold.log())

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        # A pair just below its threshold has value 0, but its threshold gets a gradient: in training it is kept.
        half = self.config.bandwidth / 2 if self.training and torch.is_grad_enabled() else 0.0
        return Above(self.threshold().detach() * (1 - half), tokens, *self.log_threshold.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        return _Jump.apply(pre, self._of(pre, feature), self.config.bandwidth)

    def active(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """1 where pre > θ, else 0."""
        return _Step.apply(pre, self._of(pre, feature), self.config.bandwidth)

    def _of(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """The threshold of each pre-activation, of its shape."""
        threshold = self.threshold() if feature is None else self.log_threshold.flatten()[feature].exp()
        return threshold.expand_as(pre)


class _Jump(torch.autograd.Function):
    """pre where pre > θ, else 0. Its gradient by θ is -θ/ε where |pre - θ| < ε/2 (equation 11 of the paper), else 0,
    with ε = bandwidth · θ."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2 * threshold
        return torch.where(pre > threshold, grad, 0), torch.where(near, grad / -ctx.bandwidth, 0), None


class _Step(torch.autograd.Function):
    """1 where pre > θ, else 0. Its gradient by θ is -1/ε where |pre - θ| < ε/2, else 0; by pre it is 0 (equation 12 of
    the paper). ε = bandwidth · θ."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2 * threshold
        # A threshold of 0 has no window.
        return None, torch.where(near, grad / -(ctx.bandwidth * threshold), 0), None
