"""A transcoder evaluated on held-out text: what it explains, how sparse it is, what the language model loses by it.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins import HasModel, Provenance, Refused, Thresholded, defined, score
from clt_stages.in_model import InModel, evaluate_in_model

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder, Source
    from clt_stages import EvaluateConfig

EDGES = [-8.0 + 0.5 * step for step in range(17)]
"""Edges of the bins of the density histogram: log10 of the share of tokens, 10^-8 to 1."""

MODEL_TOKENS = 16384
"""Held-out tokens that the language model reads, where a recipe does not say."""


@attrs.frozen(kw_only=True)
class ByLayer:
    """Scores of each layer, [L]."""

    nmse: list[float | None]
    """Mean squared error / variance of the targets; None where that is not defined, see `notes`."""
    explained_variance: list[float | None]
    """1 - variance of the error / variance of the targets; None where that is not defined."""
    l0: list[float]
    """Active features per token."""
    dead_fraction: list[float]
    """Share of features that were active at none of the tokens."""
    dense_fraction: list[float]
    """Share of features that were active at more than `dense_above` of the tokens."""


@attrs.frozen(kw_only=True)
class Histogram:
    """How many features of each layer are active at which share of tokens."""

    log10_edges: list[float]
    """Edges of the bins, ascending: log10 of the share of tokens."""
    counts: list[list[int]]
    """Features in each bin, [L, bins]; a feature that was never active is in none."""


@attrs.frozen(kw_only=True, eq=False)
class Evaluation:
    """How good a transcoder is on held-out text; the content of `evaluation.json`."""

    tokens: int
    """Held-out tokens that all scores but those in `model` are measured on."""
    nmse: float | None = None
    """Mean over the layers where it is defined; None if there is no such layer."""
    explained_variance: float | None = None
    """Mean over the same layers as `nmse`."""
    l0: float
    """Active features per token, sum over layers."""
    dead_fraction: float
    """Share of features that were active at none of the tokens, mean over layers."""
    dense_fraction: float
    """Share of features that were active at more than `dense_above` of the tokens, mean over layers."""
    by_layer: ByLayer
    """The same scores of each layer."""
    dense_above: float
    """A feature is ultra-dense if it is active at more than this share of tokens."""
    density_histogram: Histogram
    """How many features are active how often."""
    model: InModel | None = None
    """The language model with the transcoder in the place of its MLPs; None where it was left out, or where the source
    has no language model."""
    notes: list[str] = attrs.field(factory=list)
    """A line for each layer without an NMSE (constant targets, numbers that are not finite): which one, and why."""
    made_from: Provenance | None = None
    """The transcoder that is judged, and the settings; None in files of earlier versions."""
    density: Tensor | None = attrs.field(default=None, metadata={"json": False})
    """The share of tokens at which each feature is active, [L, F] float32; not in the file."""
    threshold: Tensor | None = attrs.field(default=None, metadata={"json": False})
    """The thresholds [L, F] of an activation that has them; not in the file."""


def model_tokens(source: Source, config: EvaluateConfig) -> int:
    """How many held-out tokens the language model reads; 0 if it is left out.

    Raises:
        Refused: the recipe asks for some, and the source has no language model.
    """
    has_one = isinstance(source, HasModel)
    if config.model_tokens is None:
        return MODEL_TOKENS if has_one else 0
    if config.model_tokens and not has_one:
        raise Refused(
            "stages.evaluate.model_tokens",
            "the source has no language model for the transcoder to stand in for: set it to 0, "
            'or evaluate with the recipe of a source that has one, such as "stream" (`evaluate --recipe`)',
        )
    return config.model_tokens


def evaluate(transcoder: CrossLayerTranscoder, source: Source, config: EvaluateConfig) -> Evaluation:
    """Evaluate a transcoder on a source's held-out tokens; it is in eval mode afterwards.

    Raises:
        Refused: a language model is asked for, and there is none; or there is too little held-out text.
    """
    tokens_in_model = model_tokens(source, config)
    transcoder.eval()
    scores = score(transcoder, source.held_out(config.tokens))
    dense_by_layer = (scores.density > config.dense_above).double().mean(1)
    in_model = None
    if tokens_in_model and isinstance(source, HasModel):
        in_model = evaluate_in_model(transcoder, source.language_model(), tokens_in_model, scores.target_mean)
    nmse, explained_variance = defined(torch.tensor([scores.nmse, scores.explained_variance], dtype=torch.float64))
    return Evaluation(
        tokens=scores.tokens,
        nmse=nmse,
        explained_variance=explained_variance,
        l0=scores.l0,
        dead_fraction=scores.dead_fraction,
        dense_fraction=float(dense_by_layer.mean()),
        by_layer=ByLayer(
            nmse=defined(scores.nmse_by_layer),
            explained_variance=defined(scores.explained_variance_by_layer),
            l0=scores.l0_by_layer.tolist(),
            dead_fraction=scores.dead_fraction_by_layer.tolist(),
            dense_fraction=dense_by_layer.tolist(),
        ),
        dense_above=config.dense_above,
        density_histogram=_histogram(scores.density),
        model=in_model,
        notes=scores.notes(),
        density=scores.density,
        threshold=_threshold(transcoder),
    )


def _threshold(transcoder: CrossLayerTranscoder) -> Tensor | None:
    """The thresholds of all features; of several ranks, none has all."""
    activation = transcoder.activation
    if not isinstance(activation, Thresholded) or transcoder.context.parallel.tensor_ranks > 1:
        return None
    return activation.threshold().cpu()


def _histogram(density: Tensor) -> Histogram:
    edges = torch.tensor(EDGES, dtype=torch.float64)
    counts = [torch.histogram(row[row > 0].double().log10().clamp(EDGES[0], EDGES[-1]), edges)[0] for row in density]
    return Histogram(log10_edges=EDGES, counts=[of_layer.long().tolist() for of_layer in counts])


SCORES = [a.name for a in attrs.fields(ByLayer)]


def as_metrics(report: Evaluation) -> dict[str, Any]:
    """A report as loggers take it: numbers, tensors [L] and [L, F], by `evaluate/name`. None becomes NaN in a tensor;
    a single number that is None is left out."""
    metrics: dict[str, Any] = {f"evaluate/{name}": getattr(report, name) for name in SCORES}
    for name in SCORES:
        numbers = [torch.nan if number is None else number for number in getattr(report.by_layer, name)]
        metrics[f"evaluate/{name}_by_layer"] = torch.tensor(numbers)
    metrics |= {"evaluate/density": report.density, "evaluate/threshold": report.threshold}
    for name, value in ({} if report.model is None else attrs.asdict(report.model)).items():
        if isinstance(value, dict):
            metrics.update({f"evaluate/{name}_{variant}": number for variant, number in value.items()})
        else:
            metrics[f"evaluate/{'model_tokens' if name == 'tokens' else name}"] = value
    return {name: value for name, value in metrics.items() if value is not None}


NAMES = {
    "model": "model unchanged",
    "transcoder": "transcoder",
    "with_errors": "transcoder + errors",
    "mean": "mean-ablated",
    "zero": "zero-ablated",
}
"""How a table names the variants."""


def as_table(report: Evaluation) -> str:
    """A report for people; "-" where a score is not defined."""
    lines = [f"held out, {report.tokens:,} tokens"]
    lines.append(f"{'layer':>6} {'NMSE':>8} {'expl.var':>8} {'L0':>8} {'dead':>7} {'dense':>7}")
    by_layer = report.by_layer
    for layer, l0 in enumerate(by_layer.l0):
        fit = by_layer.nmse[layer], by_layer.explained_variance[layer]
        lines.append(_line(layer, fit, l0, by_layer.dead_fraction[layer], by_layer.dense_fraction[layer]))
    fit = report.nmse, report.explained_variance
    lines.append(_line("all", fit, report.l0, report.dead_fraction, report.dense_fraction))
    lines += report.notes
    in_model = report.model
    if in_model is None:
        return "\n".join([*lines, "", "not evaluated in the model: left out, or the source has no language model"])
    lines += ["", f"in the model, {in_model.tokens:,} tokens"]
    lines.append(f"{'MLPs':>20} {'CE':>8} {'KL':>9} {'top-1':>7}")
    for variant, name in NAMES.items():
        columns = in_model.cross_entropy, in_model.kl, in_model.top1
        entropy, kl, top1 = (getattr(column, variant) for column in columns)
        lines.append(f"{name:>20} {_text(entropy, '.4f'):>8} {_text(kl, '.5f'):>9} {_text(top1, '.2%'):>7}")
    for recovered, name in ((in_model.ce_recovered, "zero"), (in_model.ce_recovered_of_mean, "mean")):
        if recovered is not None:
            lines.append(f"CE recovered of what {name}-ablation loses: {recovered:.2%}")
    largest = _text(in_model.largest_logit_error_with_errors, ".2g")
    lines.append(f"largest logit error with errors added back: {largest}")
    return "\n".join(lines)


def _line(name: int | str, fit: tuple[float | None, float | None], l0: float, dead: float, dense: float) -> str:
    nmse, explained = (_text(number, ".4f") for number in fit)
    return f"{name:>6} {nmse:>8} {explained:>8} {l0:8.2f} {dead:7.2%} {dense:7.2%}"


def _text(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
