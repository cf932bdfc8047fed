"""Thresholds scaled so that each layer has a given L0 on a sample of tokens.

Whether a feature is active depends only on its own pre-activation and threshold, so each layer is calibrated alone.
A feature is active at a token if its ratio pre-activation / threshold is above the scale. So the scale for a target is
an order statistic of the layer's ratios: as many must be above it as the target asks for.

Shapes: B tokens, L layers, F features per layer, R ratios.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import Unreachable
from clt_stages.thresholds import pre_activations_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clt_plugins import Batch, CrossLayerTranscoder
    from clt_stages import ConvertConfig


@torch.no_grad()
def calibrate(
    transcoder: CrossLayerTranscoder,
    thresholds: Tensor,
    sample: Sequence[Batch],
    targets: Sequence[float],
    config: ConvertConfig,
) -> Tensor:
    """The factors of the layers' thresholds at which the L0 of each layer on the sample is its target, [L] float64.

    Args:
        thresholds: [L, F], > 0.
        sample: batches of raw activations.
        targets: an L0 for each layer.

    Raises:
        Unreachable: no factor within `scales` brings a layer's L0 near enough to its target.
    """
    tokens = sum(batch.tokens for batch in sample)
    low, high = config.scales
    scales = []
    for layer, target in enumerate(targets):
        ratios = _ratios(transcoder, thresholds[layer], sample, layer, low)
        near = max(config.tolerance * target, 1 / tokens)
        most, least = len(ratios) / tokens, _above(ratios, high) / tokens
        if not least - near <= target <= most + near:
            raise Unreachable(
                f"convert: layer {layer} cannot reach an L0 of {target:g}: it is {most:g} with its thresholds at "
                f"{low:g} times, and {least:g} at {high:g} times the estimate; change stages.convert.l0 or "
                "stages.convert.scales, or set stages.convert.unseen, the threshold of features never selected"
            )
        scale = scale_of(ratios, round(target * tokens), low, high)
        reached = _above(ratios, scale) / tokens
        if abs(reached - target) > near:
            raise Unreachable(
                f"convert: layer {layer} cannot reach an L0 of {target:g}: the nearest is {reached:g}, further than "
                f"{config.tolerance:g} of it; raise stages.convert.tolerance or stages.convert.calibration_tokens"
            )
        scales.append(scale)
    return torch.tensor(scales, dtype=torch.float64)


def scale_of(ratios: Tensor, count: int, low: float, high: float) -> float:
    """A scale between `low` and `high` with `count` ratios above it, or as near to `count` as equal ratios allow.

    It is the geometric mean of the two ratios around it, so that rounding a threshold does not move it past one.

    Args:
        ratios: [R], ascending, all above `low`.
    """
    total = len(ratios)
    # At index i, the scale is between ratios i - 1 and i, and total - i ratios are above it. Not above `high`:
    last = total - _above(ratios, high)
    index = min(max(total - count, 0), last)
    if 0 < index < total and ratios[index - 1] == ratios[index]:
        # No scale separates equal ratios: all of them are above it, or none is.
        first = int(torch.searchsorted(ratios, ratios[index]))
        after = total - _above(ratios, float(ratios[index]))
        index = first if index - first <= after - index else after
    below = float(ratios[index - 1]) if index > 0 else low
    above = min(float(ratios[index]), high) if index < total else high
    return math.sqrt(below * above)


def _above(ratios: Tensor, scale: float) -> int:
    """How many ratios [R], ascending, are above a scale."""
    return len(ratios) - int(torch.searchsorted(ratios, scale, right=True))


def _ratios(
    transcoder: CrossLayerTranscoder, thresholds: Tensor, sample: Sequence[Batch], layer: int, low: float
) -> Tensor:
    """A layer's pre-activations divided by their thresholds [F]: those above `low`, [R], ascending."""
    ratios = []
    for batch in sample:
        x = transcoder.normaliser.inputs(batch.to(transcoder.device).inputs)
        pre = pre_activations_of(transcoder, x, layer)
        ratio = pre / thresholds.to(pre)
        ratios.append(ratio[ratio > low])
    return torch.cat(ratios).sort().values
