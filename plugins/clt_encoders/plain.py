"""The encoder of the cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing").

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clt_encoders.base import Biased, zero_bias
from clt_plugins import Context, Tying, parameter, uniform

if TYPE_CHECKING:
    from clt_encoders import PlainConfig


class Plain(Biased):
    """pre = (x - b_pre) · W_enc + b_enc; without `pre_bias` b_pre is 0."""

    def __init__(self, config: PlainConfig, context: Context):
        super().__init__()
        shape = context.n_layers, context.n_features, context.d_model
        self.W_enc = parameter(uniform("W_enc", shape, context.n_features**-0.5, context, feature_axis=1), 1)
        self.b_enc = zero_bias(context)
        self.b_pre: nn.Parameter | None = None
        if config.pre_bias:
            zeros = torch.zeros(context.n_layers, context.d_model, dtype=context.dtype, device=context.device)
            # All ranks have it, and each knows the gradient by its own features only.
            self.b_pre = parameter(zeros, None, partial_gradient=True)

    def inputs(self, x: Tensor) -> Tensor:
        """[B, L, D]."""
        return x if self.b_pre is None else x - self.b_pre.to(x.dtype)

    def rows(self, tying: Tying) -> Tensor:
        """W_enc [L, F, D]."""
        return self.W_enc

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """The matrix [F, D] and bias [F] of a layer; float64 where it is computed."""
        matrix, bias = self.W_enc.detach()[layer], self.b_enc.detach()[layer]
        if self.b_pre is not None:
            bias = bias.double() - matrix.double() @ self.b_pre.detach()[layer].double()
        return matrix, bias
