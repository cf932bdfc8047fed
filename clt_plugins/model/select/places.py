"""Where numbers of a selection stand: ids, and the tokens and features that they mean.

Shapes: B tokens, L layers, F features per layer, R rows (B, or 1 for a batch), N places of a result.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from clt_plugins.contract.select import Kept, Per


@frozen
class Places:
    """A selection's shape.

    An id is layer * F + f in a row of one token, (layer * B + token) * F + f in the row of a batch.
    """

    tokens: int
    n_layers: int
    n_features: int
    k: int
    """How many are kept in a row."""
    per_token: bool
    capacity: int
    """Places of a row in a result of fixed size."""

    @classmethod
    def of(cls, tokens: int, n_layers: int, n_features: int, k: int, per: Per, capacity: int) -> Places:
        """Of the arguments of `Kernels.select`."""
        available = n_layers * n_features * (1 if per == "token" else tokens)
        return cls(tokens, n_layers, n_features, k, per == "token", min(max(k, capacity), available))

    @property
    def rows(self) -> int:
        return self.tokens if self.per_token else 1

    @property
    def columns(self) -> int:
        """Numbers of a row in a layer."""
        return self.n_features if self.per_token else self.tokens * self.n_features

    def token_and_feature(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token and the feature (layer * F + f) of ids [R, C]."""
        if self.per_token:
            return torch.arange(self.tokens, device=ids.device)[:, None].expand_as(ids), ids
        place, feature = ids // self.n_features, ids % self.n_features
        return place % self.tokens, (place // self.tokens) * self.n_features + feature

    def narrow(self, ids: Tensor, pre: Tensor, keep: Tensor) -> Kept:
        """The result, as long as what is kept of [R, C]: it reads their number."""
        token, feature = (x[keep] for x in self.token_and_feature(ids))
        values = pre[keep]
        if not self.per_token:
            # Within a token they are in order, and few bits are sorted in few passes.
            order = token.to(torch.int16 if self.tokens < 2**15 else torch.int32).sort(stable=True).indices
            token, feature, values = token[order], feature[order], values[order]
        return Kept(token, feature, values)

    def fixed(self, ids: Tensor, pre: Tensor, keep: Tensor) -> Kept:
        """The result, of a fixed size: nothing is read back."""
        token, feature = self.token_and_feature(ids)
        # Empty places go to the end, as if of a token more.
        key = token.masked_fill(~keep, self.tokens).to(torch.int16 if self.tokens < 2**15 else torch.int32)
        order = key.flatten().sort(stable=True).indices
        count = keep.sum()
        size = self.rows * self.capacity
        empty = torch.arange(size, device=ids.device) >= count
        last_feature = self.n_layers * self.n_features - 1

        def placed(x: Tensor, fill: float) -> Tensor:
            wide = torch.nn.functional.pad(x.reshape(-1)[order], (0, size - len(order)))
            return wide.masked_fill_(empty, fill)

        return Kept(placed(token, self.tokens - 1), placed(feature, last_feature), placed(pre, -torch.inf), count)
