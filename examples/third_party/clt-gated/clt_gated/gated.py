"""The gated activation. Shapes: B tokens, L layers, F features per layer of this rank, N pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Above, Context, parameter


class Gated(nn.Module):
    """The gate is open where pre > 0; then the magnitude is relu(exp(log_scale) · pre + offset), both [L, F].

    The gate itself passes no gradient; the encoder learns through the magnitude, which shares its direction.
    """

    fixed_size = False

    def __init__(self, offset: float, context: Context):
        super().__init__()
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        # At least float32: a training step is too small for the 8 bits of bfloat16.
        dtype = torch.promote_types(context.dtype, torch.float32)
        zeros = torch.zeros(shape, dtype=dtype, device=context.device)
        self.log_scale = parameter(zeros, feature_axis=1)
        self.offset = parameter(torch.full_like(zeros, offset), feature_axis=1)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        """Only pairs whose gate is open have a value or a gradient."""
        return Above(0.0, tokens, *self.log_scale.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """[N] with `feature`, or [B, L, F]."""
        scale, offset = self.log_scale.exp(), self.offset
        if feature is not None:
            scale, offset = scale.flatten()[feature], offset.flatten()[feature]
        # An empty pair has a pre-activation of -inf: the gradient of `scale` would be 0 · inf, which `where` lets pass.
        magnitude = (scale * pre.relu() + offset).relu()
        return torch.where(pre > 0, magnitude, 0).to(pre.dtype)
