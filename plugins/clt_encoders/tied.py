"""An encoder that shares the decoder's rows.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clt_encoders.base import Biased, View, unchanged, zero_bias
from clt_plugins import Context, OwnRows, Refused, Tying, parameter

if TYPE_CHECKING:
    from clt_encoders import TiedConfig


class Tied(Biased):
    """pre = g · x W_decᵀ + b_enc, with the rows with which each feature writes to its own layer; g is 1 without
    `scale`."""

    def __init__(self, config: TiedConfig, context: Context):
        super().__init__()
        self.b_enc = zero_bias(context)
        self.normalise = config.normalise
        self.scale: nn.Parameter | None = None
        if config.scale:
            self.scale = parameter(torch.ones_like(self.b_enc.detach()), 1)

    def rows(self, tying: Tying) -> Tensor:
        """[L, F, D].

        Raises:
            Refused: the decoder has no such rows to share.
        """
        if not isinstance(tying, OwnRows):
            raise Refused("encoder", "tied: this decoder has no rows to share: choose another [tying], or plain")
        rows = tying.own_rows()
        if self.normalise:
            rows = normalize(rows, dim=-1)
        return rows if self.scale is None else rows * self.scale[..., None]

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """The matrix [F, D] and bias [F] of a layer; float64 where it is computed."""
        matrix = tying.expand(layer)[:, 0]
        if self.normalise:
            matrix = normalize(matrix.double(), dim=-1)
        if self.scale is not None:
            matrix = matrix.double() * self.scale.detach()[layer][:, None].double()
        return matrix, self.b_enc.detach()[layer]

    def views(self) -> dict[str, View]:
        """b_enc and encoder_scale, [L, F]."""
        views = super().views()
        if self.scale is not None:
            del views["scale"]
            views["encoder_scale"] = ("scale", unchanged, 1)
        return views
