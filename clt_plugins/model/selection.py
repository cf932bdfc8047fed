"""Selecting features while the encoder's blocks go by: exact top-k in one pass.

`Top` says what is selected and by what score; the kernels find it (`Kernels.select`).

Shapes: B tokens, L layers, F features per layer, C columns of a layer that are looked at, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt_plugins.contract.select import Kept, Per
from clt_plugins.data.features import Pairs
from clt_plugins.distributed.topk import Together

if TYPE_CHECKING:
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.parallel import Over, Parallel

Scope = Literal["global", "layer"]
Affine = Callable[[int, Tensor], tuple[Tensor | None, Tensor | None]]
"""(layer, pre-activations [B, F]) -> scale and shift, each [F] or None (1 and 0)."""
Score = Callable[[int, Tensor], Tensor]
"""(layer, pre-activations [B, F]) -> what they are selected by, [B, F]."""


class Top:
    """Keeps the k best pre-activations of each token (`per="token"`), or k · B of the batch (`per="batch"`).

    They are compared by `pre * scale + shift`, or by a score of any other form; as they are where neither is given.
    Scores of -inf are never kept. On a GPU, where sizes are fixed, places then stay empty: see `Pairs.count`.

    Args:
        k: how many, per token on average, over all layers (scope "global") or in each layer (scope "layer"); also
            as a list, [1] or [L].
        n_features: F, of all ranks together.
        kernels: what finds the best: `context.kernels`.
        parallel: what splits features and tokens over ranks; then `see` gets this rank's part, and `finish` gives this
            rank's part of what is kept of all.
        affine: gives a layer's scale and shift, each [F] of this rank's features.
        score: gives a block's scores.
        columns: the features of each layer that are looked at, ascending, [L, C] int64; None: all. `affine` and `score`
            then get and give C columns. (Of a place without a feature the shift is -inf.)
        capacity: places per token, where k needs fewer: sizes stay the same on a GPU while k changes. Numbers as of k.
    """

    def __init__(
        self,
        k: int | Sequence[int],
        tokens: int,
        n_layers: int,
        n_features: int,
        *,
        per: Per,
        kernels: Kernels,
        scope: Scope = "global",
        parallel: Parallel | None = None,
        affine: Affine | None = None,
        score: Score | None = None,
        columns: Tensor | None = None,
        capacity: int | Sequence[int] = 0,
    ):
        self.own = range(n_features) if parallel is None else parallel.shard(n_features)
        """The features of each layer that this rank has."""
        self.n_features = n_features
        self.shape = tokens, n_layers, len(self.own)
        self.per = per
        self.scope = scope
        self.affine, self.score, self.columns = affine, score, columns
        self.parallel = parallel
        selects = 1 if scope == "global" else n_layers
        rows = 1 if per == "batch" else tokens
        batch = tokens * (1 if parallel is None else parallel.batch_ranks)
        available = n_features * (n_layers if scope == "global" else 1)
        in_row = batch if per == "batch" else 1
        self.k = [min(one, available) * in_row for one in _of_each(k, selects)]
        """How many are kept of each row, by selection: one for all layers, or one for each."""
        sharers = 1 if parallel is None else parallel.tensor_ranks * (parallel.batch_ranks if per == "batch" else 1)
        self.size = -(-sum(self.k) * rows // sharers)
        """How many pairs are kept; of several ranks, an even share of them."""
        self.width = len(self.own) if columns is None else columns.shape[1]
        """Columns of a layer."""
        self.selects = [
            kernels.select(tokens, n_layers, self.width, kept, per=per, capacity=min(places, available) * in_row)
            for kept, places in zip(self.k, _of_each(capacity, selects), strict=True)
        ]

    @property
    def adds_bias(self) -> bool:
        """Whether `see` can be given a bias: pre-activations are compared as they are."""
        return self.affine is None and self.score is None

    def see(self, layer: int, pre: Tensor, bias: Tensor | None = None) -> None:
        """Consider the pre-activations [B, F] of a layer.

        Args:
            bias: [F], what is still to be added to them, if `adds_bias`; it is not in what is kept.
        """
        if self.columns is not None:
            pre = pre.index_select(1, self.columns[layer])
            bias = None if bias is None else bias.index_select(0, self.columns[layer])
        scale, shift = (None, bias) if self.affine is None else self.affine(layer, pre)
        score = None if self.score is None else self.score(layer, pre)
        select = self.selects[0 if self.scope == "global" else layer]
        select.see(layer, pre, scale=scale, shift=shift, score=score)

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs kept and their pre-activations: exactly k per token or k · B, fewer only where scores are -inf."""
        ranks = self._ranks()
        kept = [select.finish(ranks) for select in self.selects]
        one = kept[0] if len(kept) == 1 else self._joined(kept)
        feature = one.feature if self.columns is None else self._in_layer(one.feature, one.count)
        return Pairs(one.token, feature, *self.shape, one.count), one.pre

    def _joined(self, kept: list[Kept]) -> Kept:
        """The selections of several layers as one."""
        tokens, _, _ = self.shape
        key = torch.cat([_with_empty_last(each, tokens) for each in kept])
        # Within a token they are in order, and few bits are sorted in few passes.
        order = key.to(torch.int16 if tokens < 2**15 else torch.int32).sort(stable=True).indices
        token, feature, pre = (
            torch.cat(same)[order]
            for same in zip(*((each.token, each.feature, each.pre) for each in kept), strict=True)
        )
        counts = [each.count for each in kept if each.count is not None]
        if not counts:
            return Kept(token, feature, pre)
        assert len(counts) == len(kept), "kernels give a `count` always or never"
        return Kept(token, feature, pre, torch.stack(counts).sum())

    def _in_layer(self, feature: Tensor, count: Tensor | None) -> Tensor:
        """layer * C + column -> layer * F + f."""
        assert self.columns is not None
        _, n_layers, n_features = self.shape
        first = torch.arange(n_layers, device=feature.device)[:, None] * n_features
        feature = (self.columns + first).flatten()[feature]
        if count is None:
            return feature
        empty = torch.arange(len(feature), device=feature.device) >= count
        return feature.masked_fill_(empty, n_layers * n_features - 1)

    def _ranks(self) -> Together | None:
        if self.parallel is None or self.parallel.world == 1:
            return None
        tokens = self.shape[0]
        together = self.per == "batch" and self.parallel.batch_ranks > 1
        over: Over = "all" if together else "features"
        return Together(
            per=self.per,
            n_layers=self.shape[1],
            own_tokens=tokens,
            own_features=self.width,
            sum=partial(self.parallel.total, over=over, what="selection"),
            tokens=tokens * (self.parallel.batch_ranks if together else 1),
            first_token=tokens * self.parallel.batch_rank if together else 0,
            features=self.n_features,
            first_feature=self.own.start,
        )


def _of_each(number: int | Sequence[int], selects: int) -> Sequence[int]:
    """A number for each selection."""
    return [number] * selects if isinstance(number, int) else number


def _with_empty_last(kept: Kept, tokens: int) -> Tensor:
    """The token of each place; of an empty one the number after the last token."""
    if kept.count is None:
        return kept.token
    empty = torch.arange(len(kept.token), device=kept.token.device) >= kept.count
    return kept.token.masked_fill(empty, tokens)
