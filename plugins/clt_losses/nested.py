"""Losses of parts of the features: each part must reconstruct the targets by itself, as well as it can.

A reconstruction without some features is the complete one less what those write. So only the features outside the
smallest part are decoded again, each once.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_losses.terms import Term, error_scale, squared_error
from clt_plugins import Context, Features, Forward, Pairs, Refused

if TYPE_CHECKING:
    from clt_losses import HierarchicalConfig, MatryoshkaConfig


class Nested(Term):
    """The mean over parts of the error that `mse` has for all features."""

    name: str
    shares: Sequence[float]
    """The size of each part, ascending; below 1."""

    def __init__(self, config: Any):
        self.config = config

    def part_of(self, features: Features) -> Tensor:
        """The number of the smallest part that each value is in, [N] or [B, L, F] int; as many as there are parts for
        one that is in none."""
        raise NotImplementedError

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        scale, share = error_scale(forward, "variance"), forward.share()
        part = self.part_of(forward.features)
        reconstruction, total = share.reconstruction, share.reconstruction.new_zeros(())
        for number in reversed(range(len(self.shares))):
            # Without the features of the next larger part that are not in this one.
            reconstruction = reconstruction - share.decode(_only(forward.features, part == number + 1))
            total = total + squared_error(reconstruction, share.targets, scale)
        tokens, _, d_model = share.targets.shape
        return {self.name: share.mean(self.config.weight * total / (len(self.shares) * tokens * d_model))}


class Matryoshka(Nested):
    """Parts are the first features of each layer (Bussmann et al. 2025, arXiv 2503.17547): general features come first,
    and are not absorbed by special ones."""

    name = "matryoshka"

    def __init__(self, config: MatryoshkaConfig, context: Context):
        super().__init__(config)
        self.shares = config.prefixes
        self.bounds = [max(1, round(share * context.n_features)) for share in config.prefixes]
        own = context.parallel.shard(context.n_features)
        number = torch.arange(own.start, own.stop, device=context.device)
        self.by_feature = sum((number >= bound).long() for bound in self.bounds)
        """The part of each feature number of this rank, [F]."""

    def part_of(self, features: Features) -> Tensor:
        assert isinstance(self.by_feature, Tensor)
        if features.pairs is None:
            return self.by_feature.expand(features.shape)
        return self.by_feature[features.pairs.feature % features.pairs.n_features]


class Hierarchical(Nested):
    """Parts are the highest values: one transcoder is then good at several k (HierarchicalTopK, arXiv 2505.24473).

    Raises:
        Refused: features, or for `per = "batch"` tokens, are split over ranks, which would have to rank theirs
            together.
    """

    name = "hierarchical"

    def __init__(self, config: HierarchicalConfig, context: Context):
        super().__init__(config)
        if context.parallel.tensor_ranks > 1:
            raise Refused("losses.hierarchical", "ranks values of one process: set parallel.tensor = 1")
        if context.parallel.data_ranks > 1 and config.per == "batch":
            text = 'ranks the values of a batch in one process: set per = "token", or parallel.data = 1'
            raise Refused("losses.hierarchical", text)
        self.shares = config.shares

    @torch.no_grad()
    def part_of(self, features: Features) -> Tensor:
        values = features.values
        flat = values.flatten()
        if self.config.per == "batch":
            order = flat.argsort(descending=True, stable=True)
            first, count = torch.zeros((), dtype=torch.int64, device=flat.device), (flat > 0).sum()
            group = None
        else:
            token = (
                features.pairs.token
                if features.pairs is not None
                else torch.arange(len(values), device=flat.device).repeat_interleave(values[0].numel())
            )
            by_value = flat.argsort(descending=True, stable=True)
            order = by_value[token[by_value].argsort(stable=True)]
            tokens = features.shape[0]
            zeros = torch.zeros(tokens, dtype=torch.int64, device=flat.device)
            sizes = zeros.index_add(0, token, torch.ones_like(token))
            counts = zeros.index_add(0, token, (flat > 0).long())
            group = token
            first, count = (sizes.cumsum(0) - sizes)[group], counts[group]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device)) - first
        bounds = [(share * count).ceil() for share in self.shares]
        part = sum((rank >= bound).long() for bound in bounds)
        assert isinstance(part, Tensor)
        return part.view(values.shape)


def _only(features: Features, chosen: Tensor) -> Features:
    """The chosen values; others are 0, or left out where that needs no reading from a device."""
    pairs = features.pairs
    if pairs is None or pairs.count is not None:
        return Features(features.values * chosen, pairs)
    kept = Pairs(pairs.token[chosen], pairs.feature[chosen], pairs.tokens, pairs.n_layers, pairs.n_features)
    return Features(features.values[chosen], kept)
