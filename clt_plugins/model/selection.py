"""Selecting features while the encoder's blocks go by: exact top-k in one pass, and everything above a bound.

`Top` never sorts B·L·F numbers. It keeps a pool of candidates; a block contributes only what beats the k-th best of
the pool so far, which is few after the first layer, and the pool is cut back to exactly k. Ties go to the lower index
(token, for a pool over the batch, within a layer; feature within a token), so the result depends on nothing but
the numbers.

Shapes: B tokens, L layers, F features per layer, k kept per row, N pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from clt_plugins.data.features import Pairs
from clt_plugins.distributed.topk import among_best

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Over, Parallel

Scope = Literal["global", "layer"]
Rank = Callable[[int, Tensor], Tensor]


class Pool:
    """The k best of each of R rows, as candidates come in the order of their ids.

    On a GPU all shapes are fixed and nothing is read back; on a CPU only what beats the bound is touched.
    """

    def __init__(self, rows: int, k: int):
        self.rows = rows
        self.k = k
        self.bound: Tensor | None = None
        """[R, 1]: numbers up to it cannot be among the k best; None while everything may be."""
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        """Candidates: (rank, pre-activation, id), each [R, C], in the order of their ids; empty places rank -inf."""

    def add(self, rank: Tensor, pre: Tensor, first_id: int) -> None:
        """Consider a block [R, C] with ids first_id + column; NaN counts as +inf, so that it is seen, not lost."""
        if rank.device.type != "cpu":
            self.parts.append(self._best(*_numbered(rank, pre, first_id)))
            self.parts = [self.best()]
            return
        if self.bound is None and not self.parts:
            self.bound = self._first_bound(rank)
        self.parts.append(self._above(rank, pre, first_id))
        # Cutting back costs more than a few candidates too many: let them double first.
        width = sum(part[0].shape[1] for part in self.parts)
        if width >= 2 * self.k or (self.bound is None and width >= self.k):
            self.parts = [self.best()]
            # A tie with the k-th best so far comes later and loses.
            self.bound = self.parts[0][0].amin(1, keepdim=True)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """The k best so far (rank, pre-activation, id), each [R, k] or narrower, in the order of their ids."""
        rank, pre, ids = (torch.cat(each, 1) for each in zip(*self.parts, strict=True))
        return self._best(rank, pre, ids)

    def _first_bound(self, rank: Tensor) -> Tensor | None:
        """Guess the k-th best of the first block from a sample, a little low, and make sure that k numbers pass."""
        columns = rank.shape[1]
        if columns < 4 * self.k:
            return None
        stride = max(1, columns // max(2048, 65536 // self.rows))
        sample = rank[:, ::stride]
        share = 1.25 * self.k / columns
        while share < 0.5:
            place = math.ceil(share * sample.shape[1]) + 4
            if place >= sample.shape[1]:
                return None
            bound = _kth_best(sample, place)
            if bool(((rank > bound).sum(1) >= self.k).all()):
                return bound
            share *= 2
        return None

    def _above(self, rank: Tensor, pre: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """What beats the bound, moved to the left of a narrow block; the rest of it ranks -inf."""
        if self.bound is None:
            return _numbered(rank.clone(), pre.clone(), first_id)
        row, column = (~(rank <= self.bound)).nonzero(as_tuple=True)
        if self.rows == 1:
            found = rank[:, column]
            return found, found if rank is pre else pre[:, column], (column + first_id)[None]
        counts = torch.bincount(row, minlength=self.rows)
        width = int(counts.max()) if len(row) else 0
        # Where each candidate goes in its row: its number among the row's own.
        slot = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + row * width
        flat = row * rank.shape[1] + column

        def narrow(values: Tensor, fill: float) -> Tensor:
            return values.new_full((self.rows * width,), fill).index_copy_(0, slot, values).view(self.rows, width)

        ranks = narrow(rank.reshape(-1)[flat], -torch.inf)
        return ranks, ranks if rank is pre else narrow(pre.reshape(-1)[flat], 0), narrow(column + first_id, 0)

    def _best(self, rank: Tensor, pre: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exactly the k best of each row, in the order they stand; ties to the left."""
        if rank.shape[1] <= self.k:
            return rank, pre, ids
        clean = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        kth = _kth_best(clean, self.k)
        keep = clean >= kth
        if rank.device.type != "cpu" or int(keep.sum()) > self.k * self.rows:
            ties = clean == kth
            keep = clean > kth
            wanted = self.k - keep.sum(1, keepdim=True)
            keep |= ties & (ties.cumsum(1) <= wanted)
        # Each row keeps exactly k, so their places form a block [R, k]; on a GPU `nonzero` would wait, a sort does not.
        if rank.device.type == "cpu":
            place = keep.nonzero(as_tuple=True)[1].view(self.rows, self.k)
        else:
            place = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return clean.gather(1, place), pre.gather(1, place), ids.gather(1, place)


def _kth_best(rank: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of [R, C], [R, 1]."""
    if rank.device.type == "cpu" and rank.dtype in (torch.float32, torch.float64):
        # A partition with vector instructions: some ten times the speed of torch's top-k.
        place = rank.shape[1] - k
        return torch.from_numpy(np.partition(rank.numpy(), place, axis=1)[:, place : place + 1].copy())
    return rank.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def _numbered(rank: Tensor, pre: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block with its ids."""
    return rank, pre, (torch.arange(rank.shape[1], device=rank.device) + first_id).expand_as(rank)


class Top:
    """Keeps the k highest-ranked pre-activations of each token (`per="token"`), or k · B of the batch (`per="batch"`).

    Args:
        k: how many, per token on average, over all layers (scope "global") or in each layer (scope "layer").
        features: F, of all ranks together.
        parallel: what splits features and tokens over ranks; `see` then gets this rank's part, and `finish` gives this
            rank's part of what is kept of all.
        rank: gives what a block is ranked by, [B, F]; the pre-activations themselves if None. Entries of -inf
            are never kept (on a GPU, where sizes stay fixed, their places stand empty, with a pre-activation of -inf).
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
        self.own = range(features) if parallel is None else parallel.shard(features)
        self.n_features = features
        self.shape = tokens, layers, len(self.own)
        self.per = per
        self.scope = scope
        self.rank = rank
        self.parallel = parallel
        room = features * (layers if scope == "global" else 1)
        batch = tokens * (1 if parallel is None else parallel.batch_ranks)
        self.k = min(k, room) * (batch if per == "batch" else 1)
        size = self.k * (tokens if per == "token" else 1) * (1 if scope == "global" else layers)
        shares = 1 if parallel is None else parallel.tensor_ranks * (parallel.batch_ranks if per == "batch" else 1)
        self.size = -(-size // shares)
        """How many pairs are kept; of several ranks, a rank's even share."""
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
        found = [pool.best() for pool in self.pools]
        split = self.parallel is not None and self.parallel.world > 1
        kept = self._kept_of_all(found) if split else itertools.repeat(None)
        for (rank, values, ids), keep in zip(found, kept, strict=False):
            token, feature = self._place(ids)
            each = token * (layers * features) + feature
            empty = rank == -torch.inf
            if keep is None and rank.device.type == "cpu" and bool(empty.any()):
                keep = ~empty
            values = torch.where(empty, -torch.inf, values)
            flat.append(each.flatten() if keep is None else each[keep])
            pre.append(values.flatten() if keep is None else values[keep])
        order = torch.cat(flat)
        values = torch.cat(pre)
        if self.per == "batch" or len(self.pools) > 1:
            order, permutation = order.sort()
            values = values[permutation]
        pairs = Pairs(order // (layers * features), order % (layers * features), tokens, layers, features)
        return pairs, values

    def _place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token and the feature (layer * F + f) of a pool's ids."""
        tokens, _, features = self.shape
        if self.per == "token":
            return torch.arange(tokens, device=ids.device)[:, None], ids
        layer, rest = ids // (tokens * features), ids % (tokens * features)
        return rest // features, layer * features + rest % features

    def _kept_of_all(self, found: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """Which of this rank's best are among the best of all ranks, for each pool a mask like its ids."""
        assert self.parallel is not None
        tokens, layers, features = self.shape
        batch = tokens * self.parallel.batch_ranks if self.per == "batch" else 1
        ids = []
        for _, _, each in found:
            # The number the candidate would have in one process: layer, token of the whole batch, feature of all.
            token, feature = self._place(each)
            row = (feature // features) * batch
            if self.per == "batch":
                row = row + self.parallel.batch_rank * tokens + token
            ids.append(row * self.n_features + self.own.start + feature % features)
        over: Over = "all" if self.per == "batch" and self.parallel.batch_ranks > 1 else "features"
        total = partial(self.parallel.total, over=over, what="selection")
        return among_best([rank for rank, _, _ in found], ids, self.k, layers * batch * self.n_features, total)


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
