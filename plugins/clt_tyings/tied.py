"""Decoders shared between layers: one per source layer, or one per target layer.

g_t(a) = (a + offset_t) · scale_t on active features, 0 on others. Offset and scale are optional, and are indexed by
target layer and feature number. They are folded into the values, which then differ by target.

A feature just below a learned threshold has value 0 but may have a gradient. It is not active: the offset is not added,
and it writes nothing. Its gradient is multiplied by the scale, as that of active features is.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from clt_plugins import Context, Features, Layout, Refused, dense_decode, own_rows, parameter, sparse_decode, uniform
from clt_tyings.decoder import Decoder, View, unchanged

if TYPE_CHECKING:
    from clt_tyings import TiedConfig


class Tied(Decoder):
    """A weight [L, F, D], indexed by source layer or by target layer, and g_t."""

    def __init__(self, config: TiedConfig, context: Context):
        super().__init__(context, skip=config.skip)
        bound = (context.n_layers * context.d_model) ** -0.5
        shape = context.n_layers, context.n_features, context.d_model
        self.weight = parameter(uniform("W_dec", shape, bound, context, feature_axis=1), 1)
        per_target = torch.zeros(context.n_layers, self.n_features, dtype=context.dtype, device=context.device)
        self.offset = parameter(per_target, 1) if config.feature_offset else None
        # The reference library starts the first layer at 1 and later ones at 0.1.
        first_scale = torch.full_like(per_target, 0.1)
        first_scale[:1] = 1
        self.scale = parameter(first_scale, 1) if config.feature_scale else None

    def _values(self, features: Features) -> Tensor:
        """g_t of the pairs' values: [N, L] with a column for each target; without g the values themselves, [N]."""
        values, pairs = features.values, features.pairs
        if pairs is None or (self.offset is None and self.scale is None):
            return values
        number = pairs.feature % pairs.n_features
        out = values[:, None].expand(-1, self.n_layers)
        if self.offset is not None:
            out = out + self.offset[:, number].T * (values > 0)[:, None]
        if self.scale is not None:
            out = out * self.scale[:, number].T
        return out.contiguous()

    def _dense_values(self, acts: Tensor, target: int) -> Tensor:
        """g_t of dense activations [..., F]."""
        out = acts
        if self.offset is not None:
            out = out + self.offset[target] * (acts > 0)
        if self.scale is not None:
            out = out * self.scale[target]
        return out

    def _factors(self, layer: int) -> Tensor:
        """scale_t for the targets of a source layer, [F, L - layer, 1]."""
        if self.scale is None:
            return self.weight.new_ones(self.n_features, self.n_layers - layer, 1)
        return self.scale.detach()[layer:].T[..., None]

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer as if untied, scales folded in: [F, L - layer, D], detached."""
        return self._rows(layer) * self._factors(layer)

    def shift(self, layer: int) -> Tensor | None:
        """The offset of a source layer's active features, [F], added before `expand`'s rows; None without an offset.

        Raises:
            Refused: it differs between target layers, which no rows can hold.
        """
        if self.offset is None:
            return None
        to_targets = self.offset.detach()[layer:]
        if bool((to_targets != to_targets[:1]).any()):
            raise Refused(
                "tying.feature_offset",
                "differs between target layers, which no decoder rows can hold; train without it to export",
            )
        return to_targets[0]

    def own_rows(self) -> Tensor:
        """What each feature writes to its own layer, [L, F, D], scales included; differentiable."""
        rows = own_rows(self.weight, Layout.own_layer(self.n_layers, self.n_features))
        return rows if self.scale is None else rows * self.scale[..., None]

    def _rows(self, layer: int) -> Tensor:
        """The rows of a source layer's features for each target, without scales: [F, L - layer, D], detached."""
        raise NotImplementedError

    def norms(self) -> Tensor:
        """Norm of all that a feature writes per unit of activation, scales included: [L, F], detached."""
        return torch.stack([self.expand(layer).float().flatten(1).norm(dim=1) for layer in range(self.n_layers)])

    def views(self) -> dict[str, View]:
        """W_dec [L, F, D], feature_offset and feature_scale [L, F]."""
        views = self.shared_views()
        views["W_dec"] = ("weight", unchanged, 1)
        if self.offset is not None:
            views["feature_offset"] = ("offset", unchanged, 1)
        if self.scale is not None:
            views["feature_scale"] = ("scale", unchanged, 1)
        return views


class PerSource(Tied):
    """y_t = sum over s <= t of g_t(a_s) W_s.

    Without g this is the running sum over layers of a_s W_s: each layer is decoded once, for all its targets.
    """

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]."""
        plain = self.offset is None and self.scale is None
        if features.pairs is not None:
            layout = (Layout.own_layer if plain else Layout.per_source)(self.n_layers, self.n_features)
            out = sparse_decode(self._values(features), features.pairs, self.weight, layout, self.kernels)
            return out.cumsum(1) if plain else out
        acts = features.dense()
        if plain:
            own = Layout.own_layer(self.n_layers, self.n_features)
            return dense_decode(acts, self.weight, own).cumsum(1)
        out = acts.new_zeros(acts.shape[0], self.n_layers, self.weight.shape[-1])
        for source in range(self.n_layers):
            # A product per source layer, with the targets as further tokens: each row of the weight is used once.
            targets = range(source, self.n_layers)
            values = torch.stack([self._dense_values(acts[:, source], t) for t in targets], 1)
            one = Layout(
                self.n_features, (source * self.n_features,), (1,), (0,), (1,), self.n_layers * self.n_features
            )
            written = dense_decode(values.flatten(0, 1)[:, None], self.weight, one)
            out = out + pad(written.view(-1, len(targets), out.shape[-1]), (0, 0, source, 0))
        return out

    def feature_rows(self, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The row of each of a layer's features, for all targets: [F, 1, D]."""
        return "weight", lambda weight: weight[layer][:, None]

    def _rows(self, layer: int) -> Tensor:
        return self.weight.detach()[layer][:, None].expand(-1, self.n_layers - layer, -1)


class PerTarget(Tied):
    """y_t = (sum over s <= t of g_t(a_s)) W_t."""

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]."""
        if features.pairs is not None:
            layout = Layout.per_target(self.n_layers, self.n_features)
            return sparse_decode(self._values(features), features.pairs, self.weight, layout, self.kernels)
        acts, own = features.dense(), Layout.own_layer(self.n_layers, self.n_features)
        if self.offset is None and self.scale is None:
            return dense_decode(acts.cumsum(1), self.weight, own)
        sums = [self._dense_values(acts[:, : t + 1], t).sum(1) for t in range(self.n_layers)]
        return dense_decode(torch.stack(sums, 1), self.weight, own)

    def _rows(self, layer: int) -> Tensor:
        return self.weight.detach()[layer:].transpose(0, 1)
