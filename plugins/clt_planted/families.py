"""Absorption and splitting of features, as `stage` defines them.

Shapes: B tokens, L layers, F features per layer of the transcoder, C computed true features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_planted.source import KnowsTruth

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clt_planted.activity_sums import ActivitySums
    from clt_plugins import Batch, Features, Scores

ABSORBED = 0.25
"""A child's feature absorbs the parent if it writes at least this share of the parent's value."""
PART = 0.1
"""A part of a split feature writes at least this share of it."""
PRECISE = 0.9
"""A part of a split feature is active at tokens of the true feature, for at least this share of its own tokens."""


class AbsorptionSums:
    """A `HeldOut`: by (parent, child), the tokens with the child, and those of them at which it absorbs the parent."""

    def __init__(self, source: KnowsTruth, writes: Tensor, matches: Sequence[int | None]):
        self.source, self.truth = source, source.truth()
        computed = self.truth.computed()
        self.pairs = [
            (parent, *(computed.index(one) for one in (parent, child)), child) for parent, child in self.truth.families
        ]
        self.writes, self.matches = writes, matches
        self.sums = torch.zeros(len(self.pairs), 2, dtype=torch.float64)

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        values = self.truth.values(self.source.amounts(batch)).double()
        z = features.dense().flatten(1).cpu().double()
        for number, (parent, parent_row, child_row, child) in enumerate(self.pairs):
            on = values[:, child] > 0
            self.sums[number, 0] += float(on.sum())
            own, absorbing = self.matches[parent_row], self.matches[child_row]
            if absorbing is None:
                continue
            silent = on if own is None else on & (z[:, own] == 0)
            written = z[:, absorbing] * self.writes[parent_row, absorbing]
            self.sums[number, 1] += float((silent & (written >= ABSORBED * values[:, parent]) & (written > 0)).sum())

    def result(self, scores: Scores) -> Mapping[str, float]:
        return {}

    def mean(self) -> float | None:
        """The mean over pairs whose child was ever active."""
        seen = self.sums[self.sums[:, 0] > 0]
        return float((seen[:, 1] / seen[:, 0]).mean()) if len(seen) else None


def splitting(sums: ActivitySums, writes: Tensor) -> float:
    """The share of true features that are split.

    Args:
        writes: coordinates [C, L F], see `weights.writes`.
    """
    written = sums.where_true * writes.clamp(min=0)
    share = written / written.sum(1, keepdim=True).clamp(min=1e-300)
    precise = sums.both >= PRECISE * sums.active.clamp(min=1)
    correlation = sums.correlation().abs()
    # Features that are always active together are equally correlated, but for rounding.
    nearest = correlation >= correlation.max(0).values - 1e-6
    parts = (share >= PART) & precise & nearest
    return float((parts.sum(1) >= 2).double().mean())
