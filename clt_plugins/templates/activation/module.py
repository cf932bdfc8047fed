"""What `build` returns: an `Activation`. Shapes: B tokens, L layers, F features per layer of this rank, N pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Above, Context, parameter


class Example(nn.Module):
    """relu(pre - θ), with θ = exp(log_threshold), [L, F]."""

    fixed_size = False
    """How many pairs pass differs from batch to batch. TopK would say True."""

    def __init__(self, threshold: float, context: Context):
        super().__init__()
        # A rank has the features of its shard only. `feature_axis` says where they are counted, so that the engine can
        # save and load the parameter on any number of ranks.
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        # At least float32: a training step is too small for the 8 bits of bfloat16.
        dtype = torch.promote_types(context.dtype, torch.float32)
        start = torch.full(shape, math.log(threshold), dtype=dtype, device=context.device)
        self.log_threshold = parameter(start, feature_axis=1)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Above:
        """Which pairs of (token, feature) are kept: every pair whose value or gradient can be non-zero."""
        return Above(self.log_threshold.detach().exp(), tokens, *self.log_threshold.shape)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """The value of each pair. `pre` is [N] with the feature of each pair; or [B, L, F] with `feature` None, where
        many features are active."""
        log_threshold = self.log_threshold if feature is None else self.log_threshold.flatten()[feature]
        return (pre - log_threshold.exp()).relu().to(pre.dtype)
