"""Thresholds from the pre-activations that a selection by score (TopK, BatchTopK) kept, before calibration.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from clt_plugins import Refused, encode_dense

if TYPE_CHECKING:
    from clt_plugins import Batch, CrossLayerTranscoder
    from clt_stages import ConvertConfig

SMALLEST = 1e-7
"""Thresholds are at least this: calibration divides by them."""


@torch.no_grad()
def estimate_thresholds(
    transcoder: CrossLayerTranscoder, batches: Iterable[Batch], config: ConvertConfig
) -> tuple[Tensor, Tensor]:
    """Thresholds by the estimate that `config.thresholds` names.

    Args:
        batches: of raw activations.

    Returns:
        Thresholds [L, F] float64, > 0; and how many features of each layer were never selected, [L] int64. The
        threshold of those features is `config.unseen`, or else the mean of their layer's other thresholds; in a layer
        without any, the mean of all layers'.
    """
    device = transcoder.device
    estimate = ESTIMATES[config.thresholds](transcoder)
    # In how many batches each feature was selected.
    seen = torch.zeros(transcoder.shape, dtype=torch.float64, device=device)
    for batch in batches:
        x = transcoder.normaliser.inputs(batch.to(device).inputs)
        smallest = smallest_selected(transcoder, x)
        seen += smallest.isfinite()
        estimate.add(x, smallest)
    thresholds, selected = estimate.result(seen), seen > 0
    total, count = (thresholds * selected).sum(1), selected.sum(1)
    mean = torch.where(count > 0, total / count.clamp_min(1), total.sum() / count.sum().clamp_min(1))
    unseen = mean if config.unseen is None else torch.full_like(mean, config.unseen)
    return torch.where(selected, thresholds, unseen[:, None]).clamp_min(SMALLEST), (~selected).sum(1)


def smallest_selected(transcoder: CrossLayerTranscoder, x: Tensor) -> Tensor:
    """Each feature's smallest active value among tokens of normalised inputs [B, L, D]: [L, F] float64, inf if none."""
    n_layers, n_features = transcoder.shape
    features = transcoder.encode_normalised(x).features
    if features.pairs is None:  # an activation without a fixed size may run dense
        acts = features.values.double()
        return torch.where(acts > 0, acts, math.inf).amin(0)
    active = features.values > 0
    feature, values = features.pairs.feature[active], features.values[active].double()
    smallest = torch.full((n_layers * n_features,), math.inf, dtype=torch.float64, device=x.device)
    return smallest.scatter_reduce(0, feature, values, "amin").view(n_layers, n_features)


def pre_activations_of(transcoder: CrossLayerTranscoder, x: Tensor, layer: int) -> Tensor:
    """The pre-activations of one layer, [B, F], from normalised inputs [B, L, D]."""
    one = slice(layer, layer + 1)
    h, rows, bias = transcoder.affine_form(x)
    return encode_dense(h[:, one], rows[one], bias[one])[:, 0]


class Estimate(Protocol):
    """Sums over batches, in float64, and the thresholds that follow from them."""

    def add(self, x: Tensor, smallest: Tensor) -> None:
        """Add a batch: its normalised inputs [B, L, D], and what `smallest_selected` says of them, [L, F]."""

    def result(self, seen: Tensor) -> Tensor:
        """Thresholds [L, F]; those of features that were never selected mean nothing.

        Args:
            seen: in how many batches each feature was selected, [L, F].
        """


class OfEachFeature:
    """ "feature": the mean over batches of the feature's smallest selected pre-activation.

    Bussmann et al. 2024 (arXiv 2412.06410), section 3, use one threshold for all features; here each has its own.
    """

    def __init__(self, transcoder: CrossLayerTranscoder):
        self.total = _zeros(transcoder)

    def add(self, x: Tensor, smallest: Tensor) -> None:
        self.total += torch.where(smallest.isfinite(), smallest, 0)

    def result(self, seen: Tensor) -> Tensor:
        return self.total / seen.clamp_min(1)


class CutOfLayer:
    """ "cut": one threshold per layer, the mean over batches of its smallest selected pre-activation of any feature."""

    def __init__(self, transcoder: CrossLayerTranscoder):
        self.total = _zeros(transcoder)[:, 0]
        self.batches = torch.zeros_like(self.total)

    def add(self, x: Tensor, smallest: Tensor) -> None:
        cut = smallest.amin(1)
        self.total += torch.where(cut.isfinite(), cut, 0)
        self.batches += cut.isfinite()

    def result(self, seen: Tensor) -> Tensor:
        return (self.total / self.batches.clamp_min(1))[:, None].expand_as(seen)


class StandardisedOfLayer:
    """ "layer": one threshold per layer in standardised units, (pre - mean) / std over the batch's tokens.

    It is crosslayer-coding's, which selects by standardised pre-activations. It needs all pre-activations of
    every batch; the other estimates need only the selected ones.
    """

    def __init__(self, transcoder: CrossLayerTranscoder):
        self.transcoder = transcoder
        self.total, self.mean, self.std = _zeros(transcoder), _zeros(transcoder), _zeros(transcoder)
        self.batches = 0

    def add(self, x: Tensor, smallest: Tensor) -> None:
        if len(x) < 2:
            raise Refused(
                "stages.convert.thresholds", '"layer" needs batches of at least 2 tokens: use "feature" or "cut"'
            )
        self.batches += 1
        for layer, of_layer in enumerate(smallest):
            pre = pre_activations_of(self.transcoder, x, layer).double()
            mean, std = pre.mean(0), pre.std(0)
            self.mean[layer] += mean
            self.std[layer] += std
            self.total[layer] += torch.where(of_layer.isfinite(), (of_layer - mean) / (std + 1e-6), 0)

    def result(self, seen: Tensor) -> Tensor:
        standardised = self.total / seen.clamp_min(1)
        # Features that were selected below their mean are left out of the average.
        counted = (seen > 0) & (standardised > 0)
        threshold = (standardised * counted).sum(1) / counted.sum(1).clamp_min(1)
        return threshold[:, None] * self.std / self.batches + self.mean / self.batches


ESTIMATES: dict[str, Callable[[CrossLayerTranscoder], Estimate]] = {
    "feature": OfEachFeature,
    "cut": CutOfLayer,
    "layer": StandardisedOfLayer,
}
"""By the value of `ConvertConfig.thresholds`."""


def _zeros(transcoder: CrossLayerTranscoder) -> Tensor:
    """[L, F] float64."""
    return torch.zeros(transcoder.shape, dtype=torch.float64, device=transcoder.device)
