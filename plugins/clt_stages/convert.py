"""Thresholds in place of a selection by score: TopK and BatchTopK become JumpReLU, at the same L0 in every layer.

A selection over a batch makes a token's features depend on its neighbours. A threshold per feature does not, and other
tools read thresholds only. Estimated thresholds give nearly the L0 that the selection had; then each layer's are scaled
until they give it exactly (`calibrate`).

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import Provenance, Refused, Scores, Settable, Thresholded, build, defined, score
from clt_stages.calibrate import calibrate
from clt_stages.thresholds import estimate_thresholds

if TYPE_CHECKING:
    from clt_plugins import Batch, CrossLayerTranscoder, Selected, Source
    from clt_stages import ConvertConfig


@attrs.frozen(kw_only=True)
class LayerScores:
    """A transcoder's scores on held-out tokens, by layer [L]."""

    l0: list[float]
    """Active features per token."""
    nmse: list[float | None]
    """Mean squared error / variance of the targets; None where that is not defined."""
    explained_variance: list[float | None]
    """1 - variance of the error / variance of the targets; None where that is not defined."""

    @classmethod
    def of(cls, scores: Scores) -> LayerScores:
        return cls(
            l0=scores.l0_by_layer.tolist(),
            nmse=defined(scores.nmse_by_layer),
            explained_variance=defined(scores.explained_variance_by_layer),
        )


@attrs.frozen(kw_only=True)
class Conversion:
    """What a conversion did; the content of `convert.json`."""

    thresholds: str
    """The estimate of the thresholds: `thresholds` of the stage's settings."""
    calibrated_to: list[float]
    """The target of each layer's L0 on the tokens calibrated on, [L]."""
    scales: list[float]
    """The factor that calibration put on each layer's thresholds, [L]; 1 without calibration."""
    unseen_features: list[int]
    """Features of each layer that were selected at none of the tokens estimated from, [L]."""
    calibration_tokens: int
    """Held-out tokens calibrated on."""
    report_tokens: int
    """Other held-out tokens, which `before`, `after` and `l0_change` are measured on."""
    before: LayerScores
    """The scores of the selection by score."""
    after: LayerScores
    """The scores of the thresholds."""
    l0_change: list[float | None]
    """By how much each layer's L0 changed, as a share of the L0 before, [L]; None where that was 0 and is not now."""
    made_from: Provenance | None = None
    """The transcoder that was converted, and the settings; None in files of earlier versions."""


def convert(
    transcoder: CrossLayerTranscoder, source: Source, config: ConvertConfig
) -> tuple[CrossLayerTranscoder, Conversion]:
    """A transcoder with thresholds that shares all weights with the one given, and a report.

    Raises:
        Refused: the transcoder has thresholds already, the new activation takes none, or the data do not fit.
        Unreachable: a layer cannot reach its target.
    """
    check_convertible(transcoder)
    targets = config.targets(transcoder.n_layers, transcoder.n_features)
    # An activation that takes no thresholds is refused before the work.
    with_thresholds(transcoder, torch.ones(transcoder.shape), config.activation)
    transcoder.eval()
    n_batches = max(1, -(-config.tokens // _batch_tokens(source)))
    thresholds, unseen = estimate_thresholds(transcoder, islice(iter(source.next, None), n_batches), config)

    sample, report_batches = _samples(source, config.calibration_tokens)
    before = score(transcoder, report_batches)
    if targets is None:
        targets = score(transcoder, sample).l0_by_layer.tolist()
    scales = torch.ones(transcoder.n_layers, dtype=torch.float64)
    if config.calibrate:
        scales = calibrate(transcoder, thresholds, sample, targets, config)
        thresholds = thresholds * scales.to(thresholds)[:, None]
    converted = with_thresholds(transcoder, thresholds, config.activation)
    after = score(converted, report_batches)
    l0 = zip(before.l0_by_layer.tolist(), after.l0_by_layer.tolist(), strict=True)
    report = Conversion(
        thresholds=config.thresholds,
        calibrated_to=targets,
        scales=scales.tolist(),
        unseen_features=unseen.tolist(),
        calibration_tokens=sum(batch.tokens for batch in sample),
        report_tokens=after.tokens,
        before=LayerScores.of(before),
        after=LayerScores.of(after),
        l0_change=[new / old - 1 if old else None if new else 0.0 for old, new in l0],
    )
    return converted, report


def check_convertible(transcoder: CrossLayerTranscoder) -> None:
    """Refuse to convert a transcoder that needs no conversion, or that thresholds cannot stand for.

    Raises:
        Refused: its active features are those above a threshold already; or their values are not their pre-activations.
    """
    name = transcoder.choices["activation"].name
    if isinstance(transcoder.activation, Thresholded):
        raise Refused("stages.convert", f"{name} has thresholds already, there is nothing to convert: leave it out")
    if transcoder.device.type == "meta":
        return  # a plan has no numbers to try
    # A threshold only chooses: what it lets pass is the pre-activation. So it must be what the activation lets pass.
    n_layers, n_features = transcoder.shape
    feature = torch.arange(n_layers * n_features, device=transcoder.device)
    dtype = transcoder.target_variance.dtype
    with torch.no_grad():
        for number in (0.25, 1.0, 4.0):
            pre = torch.full(feature.shape, number, dtype=dtype, device=feature.device)
            if not torch.equal(transcoder.activation(pre, feature), pre):
                raise Refused(
                    "stages.convert",
                    f"{name} changes the pre-activations that it keeps, so no threshold can stand for it: leave it "
                    "out, and export to a format that needs no thresholds",
                )


def with_thresholds(transcoder: CrossLayerTranscoder, thresholds: Tensor, activation: Selected) -> CrossLayerTranscoder:
    """A transcoder that shares the weights of another, but is active above thresholds [L, F].

    Args:
        activation: what holds the thresholds.

    Raises:
        Refused: it takes no thresholds.
    """
    device = transcoder.device
    built = build(activation, attrs.evolve(transcoder.context, device=device))
    if not isinstance(built, Settable):
        raise Refused(
            "stages.convert.activation",
            f"{activation.name!r} takes no thresholds: choose one that does, such as jumprelu",
        )
    built.set_threshold(thresholds.to(device))
    return transcoder.with_activation(activation, built)


def _samples(source: Source, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Held-out batches to calibrate on, and others to report on: `tokens` each, or half of what there is.

    They are kept in memory, since calibration reads them once for each layer.
    """
    held_out = list(source.held_out(2 * tokens))
    if len(held_out) == 1:
        half = -(-held_out[0].tokens // 2)
        return [held_out[0].rows(slice(0, half))], [held_out[0].rows(slice(half, None))]
    # Every other batch, so that both samples come from the same documents.
    return held_out[::2], held_out[1::2]


def _batch_tokens(source: Source) -> int:
    """Tokens in a training batch; the source's state stays as it was."""
    state = source.state()
    tokens = source.next().tokens
    source.load_state(state)
    return tokens


def as_table(report: Conversion) -> str:
    """A report for people: before -> after, by layer; "-" where a score is not defined."""
    lines = [f"on {report.report_tokens:,} held-out tokens not calibrated on, before -> after"]
    lines.append(f"{'layer':>6} {'L0':>18} {'NMSE':>18} {'expl.var':>18} {'scale':>8} {'unseen':>7}")
    before, after = report.before, report.after
    for layer, scale in enumerate(report.scales):
        lines.append(
            f"{layer:>6} {before.l0[layer]:8.3f} -> {after.l0[layer]:6.3f} "
            f"{_change(before.nmse, after.nmse, layer)} "
            f"{_change(before.explained_variance, after.explained_variance, layer)} "
            f"{scale:8.4f} {report.unseen_features[layer]:>7}"
        )
    return "\n".join(lines)


def _change(before: Sequence[float | None], after: Sequence[float | None], layer: int) -> str:
    old, new = ("-" if numbers[layer] is None else f"{numbers[layer]:.4f}" for numbers in (before, after))
    return f"{old:>8} -> {new:>6}"
