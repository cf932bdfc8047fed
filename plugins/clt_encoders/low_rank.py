"""An encoder whose matrices have a low rank.

Shapes: B tokens, L layers, D d_model, F features per layer, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_encoders.base import Biased, zero_bias
from clt_plugins import Context, Refused, Tying, generator, parameter, uniform

if TYPE_CHECKING:
    from clt_encoders import LowRankConfig


class LowRank(Biased):
    """pre = (x · W_down) · W_up + b_enc.

    The file names are not `W_enc`, since neither matrix is what that name means.
    """

    def __init__(self, config: LowRankConfig, context: Context):
        super().__init__()
        n_layers, n_features, d_model = context.n_layers, context.n_features, context.d_model
        rank = config.rank or -(-d_model // 4)
        if rank > d_model:
            raise Refused("encoder.rank", f"{rank} is more than the {d_model} dimensions of the model: lower it")
        # x of unit variance gives x · W_down unit variance, and pre-activations the variance that `plain` gives them.
        down = torch.empty(n_layers, d_model, rank, dtype=context.dtype, device=context.device)
        if not down.is_meta:
            bound = (3 / d_model) ** 0.5
            numbers = generator(context.seed, "W_down")
            down.copy_(torch.empty(down.shape, dtype=torch.float32).uniform_(-bound, bound, generator=numbers))
        # All ranks have it, and each knows the gradient by its own features only.
        self.W_down = parameter(down, None, partial_gradient=True)
        up = uniform("W_up", (n_layers, n_features, rank), (d_model / (rank * n_features)) ** 0.5, context, 1)
        self.W_up = parameter(up, 1)
        self.b_enc = zero_bias(context)

    def inputs(self, x: Tensor) -> Tensor:
        """x · W_down, [B, L, r]."""
        return torch.bmm(x.transpose(0, 1), self.W_down.to(x.dtype)).transpose(0, 1)

    def rows(self, tying: Tying) -> Tensor:
        """W_up [L, F, r]."""
        return self.W_up

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """The matrix [F, D] of a layer, float64, and its bias [F]."""
        matrix = self.W_up.detach()[layer].double() @ self.W_down.detach()[layer].double().T
        return matrix, self.b_enc.detach()[layer]
