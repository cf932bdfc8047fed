"""The selection in PyTorch's own operations: the reference, and what kernels take that have none of their own.

It never sorts B·L·F numbers. A row keeps a pool of candidates, and each layer's block adds what may be among the k best
of the row so far; then the pool is cut back to exactly k. Where sizes may follow the numbers, a block adds what beats
the k-th best of the pool, few numbers after the first layer. Where they are fixed, it adds its own k best.

Shapes: B tokens, L layers, F features per layer, R rows (B, or 1 for a batch), C columns of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clt_plugins.model.select.places import Places

if TYPE_CHECKING:
    from clt_plugins.contract.select import Kept, Per, Ranks


class Candidates(NamedTuple):
    """What may be among the k best of each row, each [R, C], in the order of their ids."""

    score: Tensor
    """-inf marks an empty column."""
    pre: Tensor
    ids: Tensor

    def columns(self, index: Tensor) -> Candidates:
        """Other columns of each row, [R, k]."""
        return Candidates(*(x.gather(1, index) for x in self))


class TorchSelect:
    """`Select` for any device and any floating type; arguments as of `Kernels.select`.

    Args:
        fixed: whether sizes are fixed and nothing is read back, as it must be on a GPU. None: as the device
            of the numbers needs it.
    """

    def __init__(
        self,
        tokens: int,
        n_layers: int,
        n_features: int,
        k: int,
        *,
        per: Per,
        capacity: int = 0,
        fixed: bool | None = None,
    ):
        self.places = Places.of(tokens, n_layers, n_features, k, per, capacity)
        self.fixed = fixed
        self.bound: Tensor | None = None
        """[R, 1]: scores up to it cannot be among the k best; None while every score may be."""
        self.parts: list[Candidates] = []

    def see(
        self,
        layer: int,
        pre: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """See `Select.see`."""
        score = scored(pre, scale, shift) if score is None else score
        if self.fixed is None:
            self.fixed = pre.device.type != "cpu"
        shape = self.places.rows, self.places.columns
        first = layer * self.places.columns
        self._see(score.reshape(shape), pre.reshape(shape), first)

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """See `Select.finish`."""
        score, pre, ids = self._cut()
        keep = score > -torch.inf
        if ranks is not None:
            keep = ranks.among(score, ids, self.places.k)
        return (self.places.fixed if self.fixed else self.places.narrow)(ids, pre, keep)

    def _see(self, score: Tensor, pre: Tensor, first: int) -> None:
        """Consider a block [R, C], whose ids are first + column."""
        if self.fixed:
            self.parts.append(self._best_of_block(score, pre, first))
            self.parts = [self._cut()]
            return
        if self.bound is None and not self.parts:
            self.bound = self._first_bound(score)
        self.parts.append(self._above(score, pre, first))
        # Cutting back costs more than a few candidates too many: let them double first.
        k, width = self.places.k, sum(part.score.shape[1] for part in self.parts)
        if width >= 2 * k or (self.bound is None and width >= k):
            self.parts = [self._cut()]
            # A later score equal to the k-th best has a higher id, so it loses: the bound itself need not pass.
            self.bound = self.parts[0].score.amin(1, keepdim=True)

    def _cut(self) -> Candidates:
        """The k best so far."""
        whole = Candidates(*(torch.cat(same, 1) for same in zip(*self.parts, strict=True)))
        clean = _clean(whole.score)
        whole = whole._replace(score=clean)
        return whole if clean.shape[1] <= self.places.k else whole.columns(self._best(clean))

    def _best_of_block(self, score: Tensor, pre: Tensor, first: int) -> Candidates:
        """The k best of a whole block [R, C] with ids first + column, without ids for all of it."""
        clean = _clean(score)
        if score.shape[1] <= self.places.k:
            return Candidates(clean, pre.clone(), _ids(score, first))
        column = self._best(clean)
        return Candidates(clean.gather(1, column), pre.gather(1, column), column + first)

    def _best(self, score: Tensor) -> Tensor:
        """The columns of the k best of each row, ascending, [R, k]; of equal scores those to the left."""
        k = self.places.k
        kth = self._kth_best(score, k)
        keep = score > kth
        missing = k - keep.sum(1, keepdim=True, dtype=torch.int32)
        ties = score == kth
        keep |= ties & (ties.cumsum(1, dtype=torch.int32) <= missing)
        # Each row keeps exactly k, so their columns form a block.
        return torch.nonzero_static(keep, size=k * score.shape[0])[:, 1].view(score.shape[0], k)

    def _kth_best(self, score: Tensor, k: int) -> Tensor:
        """The k-th largest of each row of [R, C], [R, 1]."""
        if not self.fixed and score.dtype in (torch.float32, torch.float64):
            # A partition with vector instructions takes about a tenth of the time of torch's top-k.
            position = score.shape[1] - k
            return torch.from_numpy(np.partition(score.numpy(), position, axis=1)[:, position : position + 1].copy())
        return score.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)

    def _first_bound(self, score: Tensor) -> Tensor | None:
        """Guess the k-th best of the first block from a sample, a little low, and make sure that k scores pass.

        Without a bound the first block would be copied as a whole.
        """
        columns, k = score.shape[1], self.places.k
        if columns < 4 * k:
            return None
        stride = max(1, columns // max(2048, 65536 // self.places.rows))
        sample = score[:, ::stride]
        share = 1.25 * k / columns
        while share < 0.5:
            position = math.ceil(share * sample.shape[1]) + 4
            if position >= sample.shape[1]:
                return None
            bound = self._kth_best(sample, position)
            if bool(((score > bound).sum(1) >= k).all()):
                return bound
            share *= 2
        return None

    def _above(self, score: Tensor, pre: Tensor, first: int) -> Candidates:
        """What beats the bound, moved to the left of a narrow block; the rest of that block scores -inf."""
        if self.bound is None:
            return Candidates(score.clone(), pre.clone(), _ids(score, first))
        rows = self.places.rows
        # "not <=" instead of ">": NaN passes.
        row, column = (~(score <= self.bound)).nonzero(as_tuple=True)
        if rows == 1:
            passed = score[:, column]
            return Candidates(passed, passed if score is pre else pre[:, column], (column + first)[None])
        counts = torch.bincount(row, minlength=rows)
        width = int(counts.max()) if len(row) else 0
        # The column of each candidate in the narrow block: its number among those of its row.
        target = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row] + row * width
        flat = row * score.shape[1] + column

        def narrow(values: Tensor, fill: float) -> Tensor:
            return values.new_full((rows * width,), fill).index_copy_(0, target, values).view(rows, width)

        passed = narrow(score.reshape(-1)[flat], -torch.inf)
        kept_pre = passed if score is pre else narrow(pre.reshape(-1)[flat], 0)
        return Candidates(passed, kept_pre, narrow(column + first, 0))


def scored(pre: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """pre * scale + shift, [B, F]; rounded after each operation, in the widest type."""
    score = pre if scale is None else pre * scale
    return score if shift is None else score + shift


def _ids(score: Tensor, first: int) -> Tensor:
    return (torch.arange(score.shape[1], device=score.device) + first).expand_as(score)


def _clean(score: Tensor) -> Tensor:
    """NaN counts as +inf."""
    return score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
