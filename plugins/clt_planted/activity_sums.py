"""What is summed up over held-out tokens to compare true features with those of a transcoder.

Shapes: B tokens, L layers, F features per layer of the transcoder, N true features, C of them computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_planted.source import KnowsTruth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clt_plugins import Batch, Features, Scores


class ActivitySums:
    """A `HeldOut`: moments of true values h [B, C] and of the transcoder's z [B, L F], and how often both are active.

    Args:
        features: L F.
    """

    def __init__(self, source: KnowsTruth, features: int):
        self.source, self.truth = source, source.truth()
        self.computed = self.truth.computed()
        true = len(self.computed)
        self.tokens = 0
        self.true = torch.zeros(2, true, dtype=torch.float64)
        """Sums of h and of h²."""
        self.own = torch.zeros(2, features, dtype=torch.float64)
        """Sums of z and of z²."""
        self.product = torch.zeros(true, features, dtype=torch.float64)
        """Sum of h z."""
        self.where_true = torch.zeros(true, features, dtype=torch.float64)
        """Sum of z over the tokens at which a true feature is active."""
        self.both = torch.zeros(true, features, dtype=torch.float64)
        """Tokens at which both are active."""
        self.active = torch.zeros(features, dtype=torch.float64)
        """Tokens at which a feature of the transcoder is active."""

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        h = self.truth.values(self.source.amounts(batch))[:, self.computed].double()
        z = features.dense().flatten(1).cpu().double()
        self.tokens += batch.tokens
        self.true += torch.stack([h.sum(0), h.square().sum(0)])
        self.own += torch.stack([z.sum(0), z.square().sum(0)])
        self.product += h.T @ z
        self.where_true += (h > 0).double().T @ z
        self.both += (h > 0).double().T @ (z > 0).double()
        self.active += (z > 0).double().sum(0)

    def result(self, scores: Scores) -> Mapping[str, float]:
        return {}

    def correlation(self) -> Tensor:
        """Pearson's, of each true feature with each of the transcoder, [C, L F]; 0 where one of them is constant."""
        (h, hh), (z, zz) = self.true / self.tokens, self.own / self.tokens
        covariance = self.product / self.tokens - h[:, None] * z
        variance = (hh - h.square())[:, None] * (zz - z.square())
        # A variance that is rounding alone counts as none.
        varies = ((hh - h.square()) > 1e-12 * hh)[:, None] & ((zz - z.square()) > 1e-12 * zz)
        return torch.where(varies, covariance / variance.clamp(min=1e-300).sqrt(), 0.0)
