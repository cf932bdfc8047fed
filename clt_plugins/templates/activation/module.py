"""What `build` returns. Shapes: B tokens, L layers, F features per layer of this rank, N pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Above, Context, parameter


class Example(nn.Module):
    """relu(pre - θ), θ = exp(log_threshold) [L, F]."""

    fixed_size = False  # as many pairs as pass, not the same number in every batch

    def __init__(self, threshold: float, context: Context):
        super().__init__()
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        # Thresholds stay in float32 at least: steps in bfloat16 would be rounded away.
        dtype = torch.promote_types(context.dtype, torch.float32)
        start = torch.full(shape, math.log(threshold), dtype=dtype, device=context.device)
        self.log_threshold = parameter(start, feature_axis=1)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        # Every pair whose value or gradient can be non-zero must be kept; no gradient is needed here.
        return Above(self.log_threshold.detach().exp(), tokens, *self.log_threshold.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        # pre [N] with the number of each pair's feature; or [B, L, F], where features are many.
        log_threshold = self.log_threshold if feature is None else self.log_threshold.flatten()[feature]
        return (pre - log_threshold.exp()).relu().to(pre.dtype)
