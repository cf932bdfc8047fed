"""A feature writes to its own layer only: one transcoder for each MLP (Dunefsky et al. 2024, arXiv 2406.11944).

Trained by the same recipe, such per-layer transcoders (PLTs) can be compared with a cross-layer one of equal size.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clt_plugins import Context, Features, Layout, dense_decode, parameter, sparse_decode, uniform
from clt_tyings.decoder import Decoder, View, unchanged


class PerLayer(Decoder):
    """y_t = a_t W_t, a weight [L, F, D]."""

    def __init__(self, context: Context, *, skip: bool):
        super().__init__(context, skip=skip)
        self.layout = Layout.own_layer(self.n_layers, self.n_features)
        # A target gets features of one layer, not of up to L: so the bound is `untied`'s for L = 1.
        shape = context.n_layers, context.n_features, context.d_model
        self.weight = parameter(uniform("W_dec", shape, context.d_model**-0.5, context, feature_axis=1), 1)

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]."""
        if features.pairs is not None:
            return sparse_decode(features.values, features.pairs, self.weight, self.layout, self.kernels)
        return dense_decode(features.dense(), self.weight, self.layout)

    def norms(self) -> Tensor:
        """|W_t| of each feature, [L, F], detached."""
        return self.weight.detach().float().norm(dim=2)

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer as if untied, [F, L - layer, D]: 0 for later targets, detached."""
        rows = self.weight.new_zeros(self.n_features, self.n_layers - layer, self.weight.shape[-1])
        rows[:, 0] = self.weight.detach()[layer]
        return rows

    def own_rows(self) -> Tensor:
        """What each feature writes, [L, F, D]; differentiable."""
        return self.weight

    def feature_rows(self, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The row of each of a layer's features: [F, 1, D]."""
        return "weight", lambda weight: weight[layer][:, None]

    def views(self) -> dict[str, View]:
        """W_dec [L, F, D]."""
        return {**self.shared_views(), "W_dec": ("weight", unchanged, 1)}
