"""Selecting features while the encoder's blocks go by: exact top-k in one pass, and everything above a bound.

`Top` never sorts B·L·F numbers. It keeps a pool of candidates. A block contributes only the scores that beat the k-th
best of the pool so far, which are few after the first layer; then the pool is cut back to exactly k. Of equal scores
the lower index is kept (the token, for a pool over the batch, within a layer; the feature within a token), so the
result depends on nothing but the numbers.

Shapes: B tokens, L layers, F features per layer, k kept per row, R rows of a pool, C candidates in a row, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clt_plugins.contract.abilities import Selects
from clt_plugins.data.features import Pairs
from clt_plugins.distributed.topk import among_best

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Best, Kernels, Over, Parallel

Scope = Literal["global", "layer"]
Score = Callable[[int, Tensor], Tensor]
"""(layer, pre-activations [B, F]) -> what they are selected by, [B, F]."""


class Candidates(NamedTuple):
    """What may be among the k best of each row, each [R, C], in the order of their ids."""

    score: Tensor
    """-inf marks an empty column."""
    pre: Tensor
    """The pre-activation."""
    ids: Tensor
    """layer * F + f in a pool per token, (layer * B + token) * F + f in a pool per batch."""

    @classmethod
    def of_block(cls, score: Tensor, pre: Tensor, first_id: int) -> Candidates:
        """A whole block [R, C], whose ids are first_id + column."""
        ids = torch.arange(score.shape[1], device=score.device) + first_id
        return cls(score, pre, ids.expand_as(score))

    def columns(self, index: Tensor) -> Candidates:
        """Other columns of each row, [R, k]."""
        return Candidates(*(x.gather(1, index) for x in self))


class Pool:
    """The k best of each of R rows, as candidates come in the order of their ids.

    On a GPU all shapes are fixed and nothing is read back. On a CPU only what beats the bound is touched.
    """

    def __init__(self, rows: int, k: int):
        self.rows = rows
        self.k = k
        self.bound: Tensor | None = None
        """[R, 1]: scores up to it cannot be among the k best; None while every score may be."""
        self.parts: list[Candidates] = []

    def see(self, score: Tensor, pre: Tensor, first_id: int) -> None:
        """See `Best.see`."""
        if score.device.type != "cpu":
            self.parts.append(self._best(Candidates.of_block(score, pre, first_id)))
            self.parts = [self.finish()]
            return
        if self.bound is None and not self.parts:
            self.bound = self._first_bound(score)
        self.parts.append(self._above(score, pre, first_id))
        # Cutting back costs more than a few candidates too many: let them double first.
        width = sum(part.score.shape[1] for part in self.parts)
        if width >= 2 * self.k or (self.bound is None and width >= self.k):
            self.parts = [self.finish()]
            # A later score equal to the k-th best has a higher id, so it loses: the bound itself need not pass.
            self.bound = self.parts[0].score.amin(1, keepdim=True)

    def finish(self) -> Candidates:
        """See `Best.finish`: here also the k best so far."""
        return self._best(Candidates(*(torch.cat(same, 1) for same in zip(*self.parts, strict=True))))

    def _first_bound(self, score: Tensor) -> Tensor | None:
        """Guess the k-th best of the first block from a sample, a little low, and make sure that k scores pass.

        Without a bound the first block would be copied as a whole.
        """
        columns = score.shape[1]
        if columns < 4 * self.k:
            return None
        stride = max(1, columns // max(2048, 65536 // self.rows))
        sample = score[:, ::stride]
        share = 1.25 * self.k / columns
        while share < 0.5:
            position = math.ceil(share * sample.shape[1]) + 4
            if position >= sample.shape[1]:
                return None
            bound = _kth_best(sample, position)
            if bool(((score > bound).sum(1) >= self.k).all()):
                return bound
            share *= 2
        return None

    def _above(self, score: Tensor, pre: Tensor, first_id: int) -> Candidates:
        """What beats the bound, moved to the left of a narrow block; the rest of that block scores -inf."""
        if self.bound is None:
            return Candidates.of_block(score.clone(), pre.clone(), first_id)
        # "not <=" instead of ">": NaN passes.
        row, column = (~(score <= self.bound)).nonzero(as_tuple=True)
        if self.rows == 1:
            passed = score[:, column]
            return Candidates(passed, passed if score is pre else pre[:, column], (column + first_id)[None])
        counts = torch.bincount(row, minlength=self.rows)
        width = int(counts.max()) if len(row) else 0
        # The column of each candidate in the narrow block: its number among those of its row.
        target = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + row * width
        flat = row * score.shape[1] + column

        def narrow(values: Tensor, fill: float) -> Tensor:
            return values.new_full((self.rows * width,), fill).index_copy_(0, target, values).view(self.rows, width)

        passed = narrow(score.reshape(-1)[flat], -torch.inf)
        kept_pre = passed if score is pre else narrow(pre.reshape(-1)[flat], 0)
        return Candidates(passed, kept_pre, narrow(column + first_id, 0))

    def _best(self, candidates: Candidates) -> Candidates:
        """Exactly the k best of each row, in the order of their ids; of equal scores those to the left."""
        score = candidates.score
        if score.shape[1] <= self.k:
            return candidates
        clean = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        kth = _kth_best(clean, self.k)
        keep = clean >= kth
        if score.device.type != "cpu" or int(keep.sum()) > self.k * self.rows:
            ties = clean == kth
            keep = clean > kth
            missing = self.k - keep.sum(1, keepdim=True)
            keep |= ties & (ties.cumsum(1) <= missing)
        # Each row keeps exactly k, so their columns form a block [R, k]; on a GPU `nonzero` would wait for the count, a
        # sort does not.
        if score.device.type == "cpu":
            index = keep.nonzero(as_tuple=True)[1].view(self.rows, self.k)
        else:
            index = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return candidates._replace(score=clean).columns(index)


def _kth_best(score: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of [R, C], [R, 1]."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        # A partition with vector instructions takes about a tenth of the time of torch's top-k.
        position = score.shape[1] - k
        return torch.from_numpy(np.partition(score.numpy(), position, axis=1)[:, position : position + 1].copy())
    return score.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


class Top:
    """Keeps the k best pre-activations of each token (`per="token"`), or k · B of the batch (`per="batch"`).

    Args:
        k: how many, per token on average, over all layers (scope "global") or in each layer (scope "layer").
        n_features: F, of all ranks together.
        kernels: what finds the best, where they can (`Selects`): `context.kernels`.
        parallel: what splits features and tokens over ranks; then `see` gets this rank's part, and `finish` gives this
            rank's part of what is kept of all.
        score: gives what a block is selected by, [B, F]; the pre-activations themselves if None. Scores of -inf are
            never kept (on a GPU, where sizes are fixed, their pairs stay empty, with a pre-activation of -inf).
    """

    def __init__(
        self,
        k: int,
        tokens: int,
        n_layers: int,
        n_features: int,
        *,
        per: Literal["token", "batch"],
        scope: Scope = "global",
        score: Score | None = None,
        kernels: Kernels | None = None,
        parallel: Parallel | None = None,
    ):
        self.own = range(n_features) if parallel is None else parallel.shard(n_features)
        """The features of each layer that this rank has."""
        self.n_features = n_features
        self.shape = tokens, n_layers, len(self.own)
        self.per = per
        self.scope = scope
        self.score = score
        self.parallel = parallel
        pools = 1 if scope == "global" else n_layers
        rows = 1 if per == "batch" else tokens
        batch = tokens * (1 if parallel is None else parallel.batch_ranks)
        available = n_features * (n_layers if scope == "global" else 1)
        self.k = min(k, available) * (batch if per == "batch" else 1)
        sharers = 1 if parallel is None else parallel.tensor_ranks * (parallel.batch_ranks if per == "batch" else 1)
        self.size = -(-self.k * rows * pools // sharers)
        """How many pairs are kept; of several ranks, an even share of them."""
        best = kernels.best if isinstance(kernels, Selects) else Pool
        self.pools: list[Best] = [best(rows, self.k) for _ in range(pools)]

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        score = pre if self.score is None else self.score(layer, pre)
        pool = self.pools[0 if self.scope == "global" else layer]
        if self.per == "batch":
            score, pre = score.reshape(1, -1), pre.reshape(1, -1)
        pool.see(score, pre, layer * pre.shape[1])

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs kept and their pre-activations: exactly k per token or k · B, fewer only where scores are -inf."""
        tokens, n_layers, n_features = self.shape
        best = [Candidates(*pool.finish()) for pool in self.pools]
        split = self.parallel is not None and self.parallel.world > 1
        masks: Sequence[Tensor | None] = self._among_all_ranks(best) if split else [None] * len(best)
        flat, pre = [], []
        for candidates, keep in zip(best, masks, strict=True):
            token, feature = self._token_and_feature(candidates.ids)
            number = token * (n_layers * n_features) + feature
            empty = candidates.score == -torch.inf
            if keep is None and empty.device.type == "cpu" and bool(empty.any()):
                keep = ~empty
            values = torch.where(empty, -torch.inf, candidates.pre)
            flat.append(number.flatten() if keep is None else number[keep])
            pre.append(values.flatten() if keep is None else values[keep])
        order, values = torch.cat(flat), torch.cat(pre)
        # A pool per token, over all layers, is in the order of pairs already.
        if self.per == "batch" or len(self.pools) > 1:
            # Within a token they are in order, and few bits are sorted in few passes.
            token = (order // (n_layers * n_features)).to(torch.int16 if tokens < 2**15 else torch.int32)
            permutation = token.sort(stable=True).indices
            order, values = order[permutation], values[permutation]
        width = n_layers * n_features
        return Pairs(order // width, order % width, tokens, n_layers, n_features), values

    def _token_and_feature(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token and the feature (layer * F + f) of a pool's ids."""
        tokens, _, n_features = self.shape
        if self.per == "token":
            return torch.arange(tokens, device=ids.device)[:, None], ids
        layer, rest = ids // (tokens * n_features), ids % (tokens * n_features)
        return rest // n_features, layer * n_features + rest % n_features

    def _among_all_ranks(self, best: list[Candidates]) -> list[Tensor]:
        """Which of this rank's best are among the best of all ranks: for each pool a mask like its ids."""
        assert self.parallel is not None
        tokens, n_layers, n_features = self.shape
        batch = tokens * self.parallel.batch_ranks if self.per == "batch" else 1
        ids = []
        for candidates in best:
            # The id that the candidate would have in one process: layer, token of the whole batch, feature of all.
            token, feature = self._token_and_feature(candidates.ids)
            row = (feature // n_features) * batch
            if self.per == "batch":
                row = row + self.parallel.batch_rank * tokens + token
            ids.append(row * self.n_features + self.own.start + feature % n_features)
        over: Over = "all" if self.per == "batch" and self.parallel.batch_ranks > 1 else "features"
        total = partial(self.parallel.total, over=over, what="selection")
        scores = [candidates.score for candidates in best]
        return among_best(scores, ids, self.k, n_layers * batch * self.n_features, total)


class Above:
    """Keeps every pre-activation above a bound: as many as there are.

    Args:
        bound: [L, F], or one number.
    """

    def __init__(self, bound: Tensor | float, tokens: int, n_layers: int, n_features: int):
        self.bound = bound
        self.shape = tokens, n_layers, n_features
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer: the pair as one number, (token * L + layer) * F + f, and its pre-activation."""

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        _, n_layers, n_features = self.shape
        bound = self.bound[layer] if isinstance(self.bound, Tensor) else self.bound
        # "not <=" instead of ">": NaN passes, and stops the run instead of vanishing.
        token, feature = (~(pre <= bound)).nonzero(as_tuple=True)
        number = token * (n_layers * n_features) + layer * n_features + feature
        self.kept.append((number, pre[token, feature]))

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs and their pre-activations, [N]."""
        tokens, n_layers, n_features = self.shape
        order, permutation = torch.cat([number for number, _ in self.kept]).sort()
        pre = torch.cat([values for _, values in self.kept])[permutation]
        width = n_layers * n_features
        return Pairs(order // width, order % width, tokens, n_layers, n_features), pre
