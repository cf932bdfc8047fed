"""Thresholds in place of a selection by rank: TopK and BatchTopK to JumpReLU, at the same L0 in every layer.

A selection over a batch makes a token's features depend on its neighbours; a threshold per feature does not, and is
what other tools hold. (Bussmann et al. 2024, arXiv 2412.06410, section 3, use one threshold; the variant "layer" is the
reference library's.) Thresholds only nearly give the L0 that the selection had, so each layer's are scaled until they
do: layers do not depend on each other's features, so each is searched alone, on one fixed sample.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.abilities import Settable, Thresholded
from clt_plugins.errors import ExitCode, Refused, Stopped
from clt_plugins.finished.evaluate import check_fits, check_held_out
from clt_plugins.model.encoder import encode_dense
from clt_plugins.model.scores import evaluate_batches
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.contract.recipe import ConvertConfig
    from clt_plugins.data.batch import Batch
    from clt_plugins.registry.plugins import Plugins

MAX_PROBES = 60
"""Of the bisection: it then knows a scale to more digits than float32 has."""


def convert(
    transcoder: CrossLayerTranscoder, source: Source, config: ConvertConfig, plugins: Plugins
) -> tuple[CrossLayerTranscoder, dict[str, Any]]:
    """The transcoder with thresholds; it shares all weights with the one given.

    Returns:
        The converted transcoder, and a report of plain data: `calibrated_to` (the L0 wanted on the tokens calibrated
        on), `scales` and `unseen_features` by layer; and on `report_tokens` held-out tokens that were not calibrated
        on, `before` and `after`, each `l0`, `nmse` and `explained_variance` by layer, and `l0_change`, how far the one
        L0 is from the other, as a share.

    Raises:
        ValueError: it has thresholds already, the activation asked for takes none, or the data do not fit.
        Stopped: (exit code 1) a layer cannot reach its target; nothing is changed.
    """
    check_fits(transcoder, source)
    check_held_out(source)
    check_ranks(transcoder)
    wanted = config.targets(transcoder.n_layers, transcoder.n_features)
    transcoder.eval()
    with_thresholds(transcoder, torch.ones(transcoder.W_enc.shape[:2]), config.activation, plugins)
    batches = max(1, -(-config.tokens // _batch_tokens(source)))
    estimate = Minima(transcoder, islice(iter(source.next, None), batches))
    thresholds, unseen = estimate.thresholds(config)
    converted = with_thresholds(transcoder, thresholds, config.activation, plugins)

    sample, report_on = _samples(source, config.calibration_tokens)
    before = evaluate_batches(transcoder, report_on)
    if wanted is None:
        wanted = evaluate_batches(transcoder, sample)["l0_by_layer"].tolist()
    targets = torch.tensor(wanted, dtype=torch.float64)
    scales = torch.ones(transcoder.n_layers, dtype=torch.float64)
    if config.calibrate:
        scales = calibrate(transcoder, thresholds, sample, targets, config)
        thresholds = thresholds * scales.to(thresholds)[:, None]
        converted = with_thresholds(transcoder, thresholds, config.activation, plugins)
    after = evaluate_batches(converted, report_on)
    report: dict[str, Any] = {
        "thresholds": config.thresholds,
        "calibrated_to": targets.tolist(),
        "scales": scales.tolist(),
        "unseen_features": unseen.tolist(),
        "calibration_tokens": sum(batch.tokens for batch in sample),
        "report_tokens": sum(batch.tokens for batch in report_on),
        "before": _by_layer(before),
        "after": _by_layer(after),
    }
    l0 = zip(report["before"]["l0"], report["after"]["l0"], strict=True)
    report["l0_change"] = [new / old - 1 if old else 0.0 for old, new in l0]
    return converted, report


def check_ranks(transcoder: CrossLayerTranscoder) -> None:
    """Refuse to convert what needs no conversion.

    Raises:
        ValueError: its features are those above a threshold already.
    """
    if isinstance(transcoder.activation, Thresholded):
        name = transcoder.choices["activation"].name
        raise Refused("convert", f"{name} has thresholds already, there is nothing to convert: leave out [convert]")


def _samples(source: Source, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Held-out batches to calibrate on, and others to report on: as many tokens each, or half of what there is."""
    held_out = list(source.held_out(2 * tokens))
    if len(held_out) == 1:
        half = -(-held_out[0].tokens // 2)
        return [held_out[0].rows(slice(0, half))], [held_out[0].rows(slice(half, None))]
    # Every other batch, so that both samples come from the same documents.
    return held_out[::2], held_out[1::2]


def _batch_tokens(source: Source) -> int:
    """Tokens in a training batch; drawn once and put back."""
    state = source.state()
    tokens = source.next().tokens
    source.load_state(state)
    return tokens


def with_thresholds(
    transcoder: CrossLayerTranscoder, thresholds: Tensor, activation: str, plugins: Plugins
) -> CrossLayerTranscoder:
    """A transcoder that shares the weights of another but selects by thresholds [L, F].

    Raises:
        ValueError: there is no such activation, or it takes no thresholds.
    """
    chosen = structure_choice(plugins, "activation", {"name": activation}, "convert")
    device = transcoder.W_enc.device
    made = build(chosen, attrs.evolve(transcoder.context, device=device))
    if not isinstance(made, Settable):
        raise Refused(
            "convert.activation", f"{activation!r} takes no thresholds: choose one that does, such as jumprelu"
        )
    made.set_threshold(thresholds.to(device))
    return transcoder.with_activation(chosen, made)


class Minima:
    """What the smallest selected pre-activations are, over batches; sums in float64.

    Standardised ones are (pre - mean) / std over the batch, as the reference library ranks.
    """

    @torch.no_grad()
    def __init__(self, transcoder: CrossLayerTranscoder, batches: Iterable[Batch]):
        layers, features = transcoder.W_enc.shape[:2]
        device = transcoder.W_enc.device
        shape = layers, features
        self.raw = torch.zeros(shape, dtype=torch.float64, device=device)
        self.standardised = torch.zeros_like(self.raw)
        self.seen = torch.zeros_like(self.raw)
        """In how many batches each feature was selected."""
        self.mean, self.std = torch.zeros_like(self.raw), torch.zeros_like(self.raw)
        self.cut = torch.zeros(layers, dtype=torch.float64, device=device)
        self.cuts = torch.zeros_like(self.cut)
        self.batches = 0
        for batch in batches:
            self._add(transcoder, transcoder.normaliser.inputs(batch.to(device).inputs))

    def _add(self, transcoder: CrossLayerTranscoder, x: Tensor) -> None:
        layers, features = self.raw.shape
        self.batches += 1
        found = transcoder.encode_normalised(x).features
        assert found.pairs is not None, "a selection by rank is sparse"
        active = found.values > 0
        feature, values = found.pairs.feature[active], found.values[active].double()
        smallest = torch.full((layers * features,), math.inf, dtype=torch.float64, device=x.device)
        smallest = smallest.scatter_reduce(0, feature, values, "amin").view(layers, features)
        here = smallest.isfinite()
        cut = smallest.amin(1)
        self.cut += torch.where(cut.isfinite(), cut, 0)
        self.cuts += cut.isfinite()
        for layer in range(layers):
            pre = encode_dense(
                x[:, layer : layer + 1], transcoder.W_enc[layer : layer + 1], transcoder.b_enc[layer : layer + 1]
            )[:, 0].double()
            mean, std = pre.mean(0), pre.std(0)
            self.mean[layer] += mean
            self.std[layer] += std
            standardised = (smallest[layer] - mean) / (std + 1e-6)
            self.standardised[layer] += torch.where(here[layer], standardised, 0)
        self.raw += torch.where(here, smallest, 0)
        self.seen += here

    def thresholds(self, config: ConvertConfig) -> tuple[Tensor, Tensor]:
        """Thresholds [L, F] > 0, and the number of features never selected, [L]."""
        seen = self.seen > 0
        mean_of = torch.where(seen, self.raw / self.seen.clamp_min(1), 0)
        if config.thresholds == "feature":
            found = mean_of
        elif config.thresholds == "cut":
            found = (self.cut / self.cuts.clamp_min(1))[:, None].expand_as(mean_of).clone()
        else:
            standardised = self.standardised / self.seen.clamp_min(1)
            positive = seen & (standardised > 0)
            tau = (standardised * positive).sum(1) / positive.sum(1).clamp_min(1)
            found = tau[:, None] * self.std / self.batches + self.mean / self.batches
        rest = (found * seen).sum(1) / seen.sum(1).clamp_min(1)
        default = rest[:, None] if config.unseen is None else torch.full_like(rest, config.unseen)[:, None]
        return torch.where(seen, found, default).clamp_min(1e-7), (~seen).sum(1)


@torch.no_grad()
def calibrate(
    transcoder: CrossLayerTranscoder, thresholds: Tensor, sample: list[Batch], targets: Tensor, config: ConvertConfig
) -> Tensor:
    """The factor of each layer's thresholds that brings its L0 on the sample to the target, [L].

    How often a pre-activation is above s times its threshold falls as s grows: bisection between the smallest and
    largest factor allowed, by their geometric mean.

    Raises:
        Stopped: (exit code 1) a layer's target is not between the L0 at the two ends, or no factor comes near enough.
    """
    device = transcoder.W_enc.device
    tokens = sum(batch.tokens for batch in sample)
    scales = []
    for layer in range(transcoder.n_layers):
        target = float(targets[layer])
        near = max(config.tolerance * target, 1 / tokens)
        low, high = config.scales
        above = _ratios(transcoder, thresholds[layer], sample, layer, low, device)
        l0 = lambda scale, above=above: (len(above) - int(torch.searchsorted(above, scale, right=True))) / tokens  # noqa: E731
        most, least = l0(low), l0(high)
        if not least - near <= target <= most + near:
            raise Stopped(
                ExitCode.FAILED,
                f"convert: layer {layer} cannot reach an L0 of {target:g}: it is {most:g} with its thresholds at "
                f"{low:g} times, and {least:g} at {high:g} times the estimate; change convert.l0 or convert.scales",
            )
        best = min((low, high, 1.0), key=lambda scale: abs(l0(scale) - target))
        for _ in range(MAX_PROBES):
            if abs(l0(best) - target) <= near / 10:
                break
            middle = math.sqrt(low * high)
            if abs(l0(middle) - target) < abs(l0(best) - target):
                best = middle
            if l0(middle) > target:
                low = middle
            else:
                high = middle
        if abs(l0(best) - target) > near:
            raise Stopped(
                ExitCode.FAILED,
                f"convert: layer {layer} cannot reach an L0 of {target:g}: the nearest is {l0(best):g}, further than "
                f"{config.tolerance:g} of it; raise convert.tolerance or convert.calibration_tokens",
            )
        scales.append(best)
    return torch.tensor(scales, dtype=torch.float64)


def _ratios(
    transcoder: CrossLayerTranscoder, threshold: Tensor, sample: list[Batch], layer: int, low: float, device: Any
) -> Tensor:
    """Pre-activations of a layer in units of their thresholds, those above `low`, ascending."""
    one = slice(layer, layer + 1)
    found = []
    for batch in sample:
        x = transcoder.normaliser.inputs(batch.to(device).inputs)[:, one]
        pre = encode_dense(x, transcoder.W_enc[one], transcoder.b_enc[one])[:, 0]
        ratio = pre / threshold.to(pre)
        found.append(ratio[ratio > low])
    return torch.cat(found).sort().values


REPORTED = ("l0", "nmse", "explained_variance")


def _by_layer(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[f"{name}_by_layer"].tolist() for name in REPORTED}


def as_table(report: dict[str, Any]) -> str:
    """A report for people: before -> after, by layer."""
    lines = [f"on {report['report_tokens']:,} held-out tokens not calibrated on, before -> after"]
    lines.append(f"{'layer':>6} {'L0':>18} {'NMSE':>18} {'expl.var':>18} {'scale':>8} {'unseen':>7}")
    rows = [[*zip(report["before"][name], report["after"][name], strict=True)] for name in REPORTED]
    for layer, (l0, nmse, explained) in enumerate(zip(*rows, strict=True)):
        lines.append(
            f"{layer:>6} {l0[0]:8.3f} -> {l0[1]:6.3f} {nmse[0]:8.4f} -> {nmse[1]:6.4f} "
            f"{explained[0]:8.4f} -> {explained[1]:6.4f} {report['scales'][layer]:8.4f} "
            f"{report['unseen_features'][layer]:>7}"
        )
    return "\n".join(lines)
