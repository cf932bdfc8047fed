"""A transcoder judged on held-out text: what it explains, how sparsely, and what the language model loses by it.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.contract.abilities import HasModel
from clt_plugins.errors import Refused
from clt_plugins.finished.in_model import evaluate_in_model
from clt_plugins.model.scores import score

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.contract.recipe import EvaluateConfig
    from clt_plugins.model.transcoder import CrossLayerTranscoder

EDGES = [-8.0 + 0.5 * step for step in range(17)]
"""Of the bins of the density histogram: log10 of the share of tokens, 10^-8 to 1."""

BY_LAYER = ("nmse", "explained_variance", "l0", "dead_fraction", "dense_fraction")


def check_fits(transcoder: CrossLayerTranscoder, source: Source) -> None:
    """Refuse a source whose activations a transcoder cannot read.

    Raises:
        ValueError: the numbers of layers or widths differ.
    """
    has, wants = (source.n_layers, source.d_model), (transcoder.n_layers, transcoder.d_model)
    if has != wants:
        raise Refused(
            "source",
            f"gives {has[0]} layers of d_model {has[1]}, but the transcoder is for {wants[0]} layers of "
            f"d_model {wants[1]}: name the language model and layers that it was trained on",
        )


def check_held_out(source: Source) -> None:
    """Refuse a source that keeps no text apart.

    Raises:
        ValueError: it holds out nothing.
    """
    if sum(batch.tokens for batch in source.held_out(2)) < 2:
        raise Refused("source", "holds out no text, without which nothing can be converted or evaluated: hold out some")


MODEL_TOKENS = 16384
"""For the language model to read, where a recipe does not say."""


def model_tokens(source: Source, config: EvaluateConfig) -> int:
    """How many held-out tokens the language model is to read; 0 if it is to be left out.

    Raises:
        ValueError: some are asked for, and there is no language model.
    """
    has_one = isinstance(source, HasModel)
    if config.model_tokens is None:
        return MODEL_TOKENS if has_one else 0
    if config.model_tokens and not has_one:
        raise Refused(
            "evaluate.model_tokens",
            "the source has no language model for the transcoder to stand in for: set it to 0, "
            'or evaluate with the recipe of a source that has one, such as "stream" (`evaluate --recipe`)',
        )
    return config.model_tokens


def evaluate(transcoder: CrossLayerTranscoder, source: Source, config: EvaluateConfig) -> dict[str, Any]:
    """Judge a transcoder on a source's held-out tokens.

    Returns:
        Plain data: `tokens`; `nmse`, `explained_variance`, `dead_fraction`, `dense_fraction` (means over layers) and
        `l0` (sum over layers); the same by layer under `by_layer`; `density_histogram` with `log10_edges` and `counts`
        [L, bins] (features that were never active are in none); `model`, see `replacement.evaluate_in_model`, or None
        where the source has no language model or none was asked for; and `density` as a tensor [L, F].

    Raises:
        ValueError: the transcoder is for another model, or there is no held-out text.
    """
    check_fits(transcoder, source)
    check_held_out(source)
    inside = model_tokens(source, config)
    transcoder.eval()
    scores = score(transcoder, source.held_out(config.tokens))
    found = scores.result()
    density: Tensor = found["density"]
    found["dense_fraction_by_layer"] = (density > config.dense_above).double().mean(1)
    found["dense_fraction"] = float(found["dense_fraction_by_layer"].mean())
    report: dict[str, Any] = {"tokens": scores.tokens}
    report.update({name: found[name] for name in BY_LAYER})
    report["by_layer"] = {name: found[f"{name}_by_layer"].tolist() for name in BY_LAYER}
    report["dense_above"] = config.dense_above
    report["density_histogram"] = _histogram(density)
    report["model"] = None
    if inside:
        mean = scores.targets.statistics()["targets.mean"]
        model = source.language_model()  # type: ignore[attr-defined]
        report["model"] = evaluate_in_model(transcoder, model, inside, mean)
    report["density"] = density
    return report


def _histogram(density: Tensor) -> dict[str, Any]:
    edges = torch.tensor(EDGES, dtype=torch.float64)
    counts = [torch.histogram(row[row > 0].double().log10().clamp(EDGES[0], EDGES[-1]), edges)[0] for row in density]
    return {"log10_edges": EDGES, "counts": [each.long().tolist() for each in counts]}


def as_json(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its tensor."""
    return {name: value for name, value in report.items() if name != "density"}


def as_metrics(report: dict[str, Any]) -> dict[str, Any]:
    """A report as loggers take it: numbers, [L] and [L, F], by `evaluate/name`."""
    out: dict[str, Any] = {f"evaluate/{name}": report[name] for name in BY_LAYER}
    out.update({f"evaluate/{name}_by_layer": torch.tensor(report["by_layer"][name]) for name in BY_LAYER})
    out["evaluate/density"] = report["density"]
    for name, value in (report["model"] or {}).items():
        if isinstance(value, dict):
            out.update({f"evaluate/{name}_{variant}": number for variant, number in value.items()})
        elif value is not None:
            out[f"evaluate/{'model_tokens' if name == 'tokens' else name}"] = value
    return out


NAMES = {
    "model": "model unchanged",
    "transcoder": "transcoder",
    "with_errors": "transcoder + errors",
    "mean": "mean-ablated",
    "zero": "zero-ablated",
}


def as_table(report: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"held out, {report['tokens']:,} tokens"]
    lines.append(f"{'layer':>6} {'NMSE':>8} {'expl.var':>8} {'L0':>8} {'dead':>7} {'dense':>7}")

    def line(name: Any, values: list[float]) -> str:
        nmse, explained, l0, dead, dense = values
        return f"{name:>6} {nmse:8.4f} {explained:8.4f} {l0:8.2f} {dead:7.2%} {dense:7.2%}"

    for layer, values in enumerate(zip(*(report["by_layer"][name] for name in BY_LAYER), strict=True)):
        lines.append(line(layer, list(values)))
    lines.append(line("all", [report[name] for name in BY_LAYER]))
    inside = report["model"]
    if inside is None:
        return "\n".join([*lines, "", "not judged in the model: left out, or the source has no language model"])
    lines += ["", f"in the model, {inside['tokens']:,} tokens"]
    lines.append(f"{'MLPs':>20} {'CE':>8} {'KL':>9} {'top-1':>7}")
    for variant, name in NAMES.items():
        entropy, kl, top1 = (inside[key][variant] for key in ("cross_entropy", "kl", "top1"))
        lines.append(f"{name:>20} {entropy:8.4f} {kl:9.5f} {top1:7.2%}")
    for key, name in (("ce_recovered", "zero"), ("ce_recovered_of_mean", "mean")):
        if inside[key] is not None:
            lines.append(f"CE recovered of what {name}-ablation loses: {inside[key]:.2%}")
    lines.append(f"largest logit error with errors added back: {inside['largest_logit_error_with_errors']:.2g}")
    return "\n".join(lines)
