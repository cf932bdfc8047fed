"""The sparse thing between encoder and decoder.

Shapes: B tokens, L layers, F features per layer, N active pairs. A feature's number is layer * F + f.
"""

from __future__ import annotations

from functools import cached_property

import attrs
import torch
from torch import Tensor


@attrs.define(eq=False, slots=False)
class Pairs:
    """Which features are on at which tokens: N pairs, sorted by token, then by feature."""

    token: Tensor
    """[N] int64, ascending."""
    feature: Tensor
    """[N] int64: layer * F + f, ascending within a token."""
    tokens: int
    """B."""
    n_layers: int
    """L."""
    n_features: int
    """F, per layer (of this rank's shard, under tensor parallelism)."""
    count: Tensor | None = None
    """How many of the N are pairs, a scalar int64 on the device; None: all. On a GPU sizes are fixed: what follows are
    empty places, with the last token, the last feature and a value of 0. Products leave them out."""

    @classmethod
    def from_mask(cls, mask: Tensor) -> Pairs:
        """The true entries of a mask [B, L, F]. (Reads the number of them: a synchronisation on GPUs.)"""
        tokens, layers, features = mask.shape
        token, feature = mask.reshape(tokens, layers * features).nonzero(as_tuple=True)
        return cls(token, feature, tokens, layers, features)

    @cached_property
    def layer(self) -> Tensor:
        """The source layer of each pair, [N]."""
        return self.feature // self.n_features

    @cached_property
    def token_start(self) -> Tensor:
        """Where each token's pairs begin, [B + 1]: token b owns pairs token_start[b] : token_start[b + 1]."""
        edges = torch.arange(self.tokens + 1, device=self.token.device)
        return self._without_empty(torch.searchsorted(self.token, edges))

    # Kernels need the pairs by token (decode) and by feature (gradients of rows). The second order costs a sort, so it
    # is made once per batch, and only if a gradient is asked for.
    @cached_property
    def by_feature(self) -> Tensor:
        """The pairs in feature order (tokens ascending within a feature), [N]."""
        return torch.argsort(self.feature, stable=True)

    @cached_property
    def feature_start(self) -> Tensor:
        """Where each feature's pairs begin in `by_feature`, [L * F + 1]."""
        edges = torch.arange(self.n_layers * self.n_features + 1, device=self.feature.device)
        # Empty places have the last feature and stand behind its pairs.
        return self._without_empty(torch.searchsorted(self.feature[self.by_feature], edges))

    def _without_empty(self, starts: Tensor) -> Tensor:
        return starts if self.count is None else starts.minimum(self.count)


class Features:
    """Feature activations of a batch: sparse (values of N pairs) or, while most are on, dense ([B, L, F]).

    Losses and metrics that use `values`, `per_feature` and the counts work on both forms.
    Values are never negative; a pair whose value is zero is selected but not active.
    """

    def __init__(self, values: Tensor, pairs: Pairs | None = None):
        """
        Args:
            values: [N] with `pairs`, else [B, L, F].
            pairs: where the values stand; None for the dense form.
        """
        assert values.dim() == (1 if pairs is not None else 3), values.shape
        self.values = values
        self.pairs = pairs

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, L, F)."""
        if self.pairs is None:
            tokens, layers, features = self.values.shape
            return tokens, layers, features
        return self.pairs.tokens, self.pairs.n_layers, self.pairs.n_features

    def per_feature(self, x: Tensor) -> Tensor:
        """One number per feature, [L, F], as a tensor that broadcasts against `values`."""
        return x if self.pairs is None else x.flatten()[self.pairs.feature]

    def dense(self) -> Tensor:
        """The activations as one tensor [B, L, F]; differentiable."""
        if self.pairs is None:
            return self.values
        tokens, layers, features = self.shape
        flat = self.pairs.token * (layers * features) + self.pairs.feature
        empty = self.values.new_zeros(tokens * layers * features)
        # `index_add` and not an assignment: it is differentiable in the values.
        return empty.index_add(0, flat, self.values).view(tokens, layers, features)

    def active(self) -> Tensor:
        """1 for each value above 0, else 0, in the values' type."""
        return (self.values > 0).to(self.values.dtype)

    def counts(self) -> Tensor:
        """At how many tokens of the batch each feature is active, [L, F] int64."""
        active = self.values > 0
        if self.pairs is None:
            return active.sum(0)
        tokens, layers, features = self.shape
        empty = torch.zeros(layers * features, dtype=torch.int64, device=self.values.device)
        return empty.index_add(0, self.pairs.feature, active.long()).view(layers, features)

    def l0(self) -> Tensor:
        """Active features per token, [B] int64, over all layers."""
        active = self.values > 0
        if self.pairs is None:
            return active.sum((1, 2))
        empty = torch.zeros(self.shape[0], dtype=torch.int64, device=self.values.device)
        return empty.index_add(0, self.pairs.token, active.long())
