"""The untied decoder of the cross-layer transcoder (Lindsey et al. 2025, "Circuit Tracing"), and what all tyings share.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Context, Features, Layout, parameter, sparse_decode, uniform

View = tuple[str, Callable[[Tensor], Tensor], int | None]


class Decoder(nn.Module):
    """The bias, the optional skip path, and the sizes."""

    def __init__(self, context: Context, *, skip: bool):
        super().__init__()
        self.n_layers = context.n_layers
        self.n_features = len(context.parallel.shard(context.n_features))
        self.kernels = context.kernels
        width = context.n_layers, context.d_model
        self.b_dec = parameter(torch.zeros(width, dtype=context.dtype, device=context.device), None)
        self.skip: nn.Parameter | None = None
        if skip:
            zeros = torch.zeros(*width, context.d_model, dtype=context.dtype, device=context.device)
            self.skip = parameter(zeros, None)

    def affine(self, inputs: Tensor) -> Tensor:
        """b_t, plus x_t S_t with a skip path: broadcasts to [B, L, D]."""
        bias = self.b_dec.to(inputs.dtype)
        if self.skip is None:
            return bias
        by_layer = torch.baddbmm(bias[:, None], inputs.transpose(0, 1), self.skip.to(inputs.dtype))
        return by_layer.transpose(0, 1)

    def shared_views(self) -> dict[str, View]:
        """The parameters every tying has, as files name them."""
        views: dict[str, View] = {"b_dec": ("b_dec", _whole, None)}
        if self.skip is not None:
            views["W_skip"] = ("skip", _whole, None)
        return views


class Untied(Decoder):
    """y_t = sum over s <= t of a_s W_{s->t}; the weights of a feature for all its targets are one contiguous row."""

    def __init__(self, context: Context, *, skip: bool):
        super().__init__(context, skip=skip)
        self.layout = Layout.untied(self.n_layers, self.n_features)
        bound = (context.n_layers * context.d_model) ** -0.5
        pieces = (
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
        for source, piece in enumerate(pieces):
            self._source(weight, source).copy_(piece)
        self.weight = parameter(weight, 0)

    def _source(self, weight: Tensor, source: int) -> Tensor:
        """The rows of one source layer, [F, L - s, D], a view."""
        first, count = self.layout.first[source], self.layout.count[source]
        return weight[first : first + self.n_features * count].view(self.n_features, count, -1)

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]."""
        if features.pairs is not None:
            return sparse_decode(features.values, features.pairs, self.weight, self.layout, self.kernels)
        acts = features.dense()
        out = acts.new_zeros(acts.shape[0], self.n_layers, self.weight.shape[1])
        for source in range(self.n_layers):
            rows = self._source(self.weight, source).to(acts.dtype)
            written = (acts[:, source] @ rows.flatten(1)).view(-1, *rows.shape[1:])
            out = out + nn.functional.pad(written, (0, 0, source, 0))
        return out

    def norms(self) -> Tensor:
        """sqrt(sum over t >= s of |W_{s->t}|²), [L, F], detached."""
        return torch.stack([self.expand(source).float().flatten(1).norm(dim=1) for source in range(self.n_layers)])

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer, [F, L - layer, D], detached."""
        return self._source(self.weight.detach(), layer)

    def views(self) -> dict[str, View]:
        """One tensor W_dec.SS [F, L - s, D] for each source layer."""
        views = self.shared_views()
        for source in range(self.n_layers):
            views[f"W_dec.{source:02}"] = ("weight", lambda weight, s=source: self._source(weight, s), 0)  # type: ignore[misc]
        return views


def _whole(x: Tensor) -> Tensor:
    return x
