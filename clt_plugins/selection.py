"""Selecting features while the encoder's blocks go by: exact top-k in one pass, and everything above a bound.

`Top` never sorts B·L·F numbers. It keeps a pool of candidates; a block contributes only what beats the k-th best of
the pool so far, which is few after the first layer, and the pool is cut back to exactly k. Ties go to the lower index
(token, for a pool over the batch, within a layer; feature within a token), so the result depends on nothing but
the numbers.

Shapes: B tokens, L layers, F features per layer, k kept per row, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt_plugins.features import Pairs

if TYPE_CHECKING:
    from clt_plugins.interfaces import Parallel

Scope = Literal["global", "layer"]
Rank = Callable[[int, Tensor], Tensor]


class Pool:
    """The k best of each of R rows, as candidates come in the order of their ids.

    On a GPU all shapes are fixed and nothing is read back; on a CPU only what beats the bound is touched.
    """

    def __init__(self, rows: int, k: int):
        self.rows = rows
        self.k = k
        self.rank: Tensor | None = None
        self.pre: Tensor | None = None
        self.ids: Tensor | None = None

    def add(self, rank: Tensor, pre: Tensor, first_id: int) -> None:
        """Consider a block [R, C] with ids first_id + column; NaN counts as +inf, so that it is seen, not lost."""
        if rank.device.type == "cpu":
            found = self._above(rank, pre, self._bound(rank), first_id)
        else:
            ids = torch.arange(rank.shape[1], device=rank.device).expand_as(rank) + first_id
            found = self._best(rank, pre, ids) if rank.shape[1] > self.k else (rank, pre, ids)
        if self.rank is not None:
            assert self.pre is not None and self.ids is not None
            found = (
                torch.cat([self.rank, found[0]], 1),
                torch.cat([self.pre, found[1]], 1),
                torch.cat([self.ids, found[2]], 1),
            )
        if found[0].shape[1] > self.k:
            found = self._best(*found)
        self.rank, self.pre, self.ids = found

    def _bound(self, rank: Tensor) -> Tensor | None:
        """Numbers up to the bound [R, 1] cannot be among the k best; None while everything may be."""
        if self.rank is not None:
            # The k-th best so far; a tie with it comes later and loses.
            return self.rank.amin(1, keepdim=True) if self.rank.shape[1] >= self.k else None
        if rank.shape[1] < 4 * self.k:
            return None
        # First block: guess the k-th best from a sample, a little low, and make sure that k numbers pass.
        columns = rank.shape[1]
        stride = max(1, columns // max(2048, 65536 // self.rows))
        sample = rank[:, ::stride]
        share = 1.25 * self.k / columns
        while share < 0.5:
            place = math.ceil(share * sample.shape[1]) + 4
            if place >= sample.shape[1]:
                return None
            bound = sample.topk(place, dim=1, sorted=False).values.amin(1, keepdim=True)
            if bool(((rank > bound).sum(1) >= self.k).all()):
                return bound
            share *= 2
        return None

    def _above(self, rank: Tensor, pre: Tensor, bound: Tensor | None, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """What beats the bound, moved to the left of a narrow block; the rest of it ranks -inf."""
        if bound is None:
            ids = torch.arange(rank.shape[1], device=rank.device).expand_as(rank) + first_id
            return rank.clone(), pre.clone(), ids
        row, column = (~(rank <= bound)).nonzero(as_tuple=True)
        if self.rows == 1:
            return rank[:, column], pre[:, column], (column + first_id)[None]
        counts = torch.bincount(row, minlength=self.rows)
        width = int(counts.max()) if len(row) else 0
        slot = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        narrow_rank = rank.new_full((self.rows, width), -torch.inf)
        narrow_pre = pre.new_zeros(self.rows, width)
        ids = torch.zeros(self.rows, width, dtype=torch.int64)
        narrow_rank[row, slot] = rank[row, column]
        narrow_pre[row, slot] = pre[row, column]
        ids[row, slot] = column + first_id
        return narrow_rank, narrow_pre, ids

    def _best(self, rank: Tensor, pre: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exactly the k best of each row, in the order they stand; ties to the left."""
        rank = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        kth = rank.topk(self.k, dim=1, sorted=False).values.amin(1, keepdim=True)
        better = rank > kth
        ties = rank == kth
        wanted = self.k - better.sum(1, keepdim=True)
        keep = better | (ties & (ties.cumsum(1) <= wanted))
        # Column `k` of a scatter one wider than needed takes what is not kept.
        slot = torch.where(keep, keep.cumsum(1) - 1, self.k).clamp_max(self.k)

        def pick(x: Tensor, fill: float) -> Tensor:
            out = x.new_full((self.rows, self.k + 1), fill)
            return out.scatter_(1, slot, x)[:, : self.k]

        return pick(rank, -torch.inf), pick(pre, 0), pick(ids, 0)


class Top:
    """Keeps the k highest-ranked pre-activations of each token (`per="token"`), or k · B of the batch (`per="batch"`).

    Args:
        k: how many, per token on average, over all layers (scope "global") or in each layer (scope "layer").
        rank: gives what a block is ranked by, [B, F]; the pre-activations themselves if None. Entries of -inf
            are never kept (their place stays empty: value 0).
    """

    def __init__(
        self,
        k: int,
        tokens: int,
        layers: int,
        features: int,
        *,
        per: Literal["token", "batch"],
        scope: Scope = "global",
        rank: Rank | None = None,
        parallel: Parallel | None = None,
    ):
        self.shape = tokens, layers, features
        self.per = per
        self.scope = scope
        self.rank = rank
        self.parallel = parallel
        room = features * (layers if scope == "global" else 1)
        self.k = min(k, room) * (tokens if per == "batch" else 1)
        self.size = self.k * (tokens if per == "token" else 1) * (1 if scope == "global" else layers)
        """How many pairs are kept."""
        self.pools = [Pool(1 if per == "batch" else tokens, self.k) for _ in range(1 if scope == "global" else layers)]

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        rank = pre if self.rank is None else self.rank(layer, pre)
        pool = self.pools[0 if self.scope == "global" else layer]
        if self.per == "batch":
            rank, pre = rank.reshape(1, -1), pre.reshape(1, -1)
        pool.add(rank, pre, layer * pre.shape[1])

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs kept, exactly k per token or k · B (fewer only where ranks are -inf), and their pre-activations."""
        tokens, layers, features = self.shape
        flat, pre = [], []
        for pool in self.pools:
            assert pool.ids is not None and pool.pre is not None and pool.rank is not None
            ids = pool.ids
            if self.per == "batch":
                layer, rest = ids // (tokens * features), ids % (tokens * features)
                token, feature = rest // features, layer * features + rest % features
            else:
                token, feature = torch.arange(tokens, device=ids.device)[:, None], ids
            flat.append((token * (layers * features) + feature).flatten())
            pre.append(torch.where(pool.rank > -torch.inf, pool.pre, 0).flatten())
        order = torch.cat(flat)
        values = torch.cat(pre)
        if self.per == "batch" or len(self.pools) > 1:
            order, permutation = order.sort()
            values = values[permutation]
        pairs = Pairs(order // (layers * features), order % (layers * features), tokens, layers, features)
        return pairs, values


class Above:
    """Keeps every pre-activation above a bound: as many as there are.

    Args:
        bound: [L, F], or one number.
    """

    def __init__(self, bound: Tensor | float, tokens: int, layers: int, features: int):
        self.bound = bound
        self.shape = tokens, layers, features
        self.found: list[tuple[Tensor, Tensor]] = []

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        _, layers, features = self.shape
        bound = self.bound[layer] if isinstance(self.bound, Tensor) else self.bound
        token, feature = (~(pre <= bound)).nonzero(as_tuple=True)
        self.found.append((token * (layers * features) + layer * features + feature, pre[token, feature]))

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs and their pre-activations, [N]."""
        tokens, layers, features = self.shape
        order, permutation = torch.cat([flat for flat, _ in self.found]).sort()
        pre = torch.cat([values for _, values in self.found])[permutation]
        return Pairs(order // (layers * features), order % (layers * features), tokens, layers, features), pre
