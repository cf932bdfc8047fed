"""The untied decoder of the cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing").

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clt_plugins import Context, Features, Layout, dense_decode, own_rows, parameter, sparse_decode, uniform
from clt_tyings.decoder import Decoder, View


class Untied(Decoder):
    """y_t = sum over s <= t of a_s W_{s->t}.

    The weight holds a row for each target of each feature. The rows of one feature are contiguous, so that all it
    writes is read in one piece.
    """

    def __init__(self, context: Context, *, skip: bool):
        super().__init__(context, skip=skip)
        self.layout = Layout.untied(self.n_layers, self.n_features)
        bound = (context.n_layers * context.d_model) ** -0.5
        # Drawn one source layer at a time: only one of them is in memory twice.
        by_source = (
            uniform(
                f"W_dec.{source}",
                (context.n_features, context.n_layers - source, context.d_model),
                bound,
                context,
                feature_axis=0,
            )
            for source in range(context.n_layers)
        )
        weight = torch.empty(self.layout.rows, context.d_model, dtype=context.dtype, device=context.device)
        for source, rows in enumerate(by_source):
            self._rows(weight, source).copy_(rows)
        self.weight = parameter(weight, 0)

    def _rows(self, weight: Tensor, source: int) -> Tensor:
        """The rows of one source layer s, [F, L - s, D], a view."""
        first, count = self.layout.first[source], self.layout.count[source]
        return weight[first : first + self.n_features * count].view(self.n_features, count, -1)

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]."""
        if features.pairs is not None:
            return sparse_decode(features.values, features.pairs, self.weight, self.layout, self.kernels)
        return dense_decode(features.dense(), self.weight, self.layout)

    def norms(self) -> Tensor:
        """sqrt(sum over t >= s of |W_{s->t}|²), [L, F], detached."""
        return torch.stack([self.expand(source).float().flatten(1).norm(dim=1) for source in range(self.n_layers)])

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer, [F, L - layer, D], detached."""
        return self._rows(self.weight.detach(), layer)

    def own_rows(self) -> Tensor:
        """What each feature writes to its own layer, [L, F, D]; differentiable."""
        return own_rows(self.weight, self.layout)

    def feature_rows(self, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The rows of a layer's features, one for each target: [F, L - layer, D]."""
        return "weight", lambda weight: self._rows(weight, layer)

    def views(self) -> dict[str, View]:
        """One tensor W_dec.SS [F, L - s, D] for each source layer."""
        views = self.shared_views()
        for source in range(self.n_layers):
            views[f"W_dec.{source:02}"] = ("weight", lambda weight, s=source: self._rows(weight, s), 0)  # type: ignore[misc]
        return views
