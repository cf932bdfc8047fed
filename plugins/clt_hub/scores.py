"""The scores of a model card: its `model-index`, and tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from clt_hub.facts import Facts

TASK = "feature-extraction"


@attrs.frozen
class Score:
    """A number about a transcoder."""

    kind: str
    """Its name in the `model-index`."""
    name: str
    """For people."""
    value: float
    text: str
    """The value for people."""


def scores(facts: Facts) -> list[Score]:
    """All scores that the run's folder has."""
    return [*_held_out(facts.evaluation or {}), *_of_graphs(facts.circuits or {})]


def _held_out(report: dict[str, Any]) -> Iterator[Score]:
    for key, name, form in (
        ("nmse", "NMSE, mean over layers", ".4f"),
        ("explained_variance", "explained variance, mean over layers", ".4f"),
        ("l0", "L0: active features per token, sum over layers", ".1f"),
        ("dead_fraction", "dead features", ".2%"),
    ):
        if isinstance(report.get(key), int | float):
            yield Score(key, name, report[key], format(report[key], form))
    model = report.get("model")
    if not isinstance(model, dict):
        return
    for kind, name, value, form in (
        ("ce_recovered", "cross-entropy recovered, of what zero-ablation loses", model.get("ce_recovered"), ".2%"),
        ("ce_recovered_of_mean", "the same of mean-ablation", model.get("ce_recovered_of_mean"), ".2%"),
        ("kl_divergence", "KL divergence from the model, nats per token", _variant(model, "kl"), ".4f"),
        ("top1_agreement", "top-1 agreement with the model", _variant(model, "top1"), ".2%"),
    ):
        if isinstance(value, int | float):
            yield Score(kind, name, value, format(value, form))


def _variant(model: dict[str, Any], key: str) -> Any:
    return (model.get(key) or {}).get("transcoder")


def _of_graphs(report: dict[str, Any]) -> Iterator[Score]:
    graphs = len(report.get("graphs") or [])
    for key in ("replacement", "completeness"):
        if isinstance(report.get(key), int | float):
            name = f"{key} score of attribution graphs, mean of {graphs} prompts"
            yield Score(f"{key}_score", name, report[key], f"{report[key]:.4f}")


def model_index(facts: Facts) -> list[Any]:
    """The scores as `EvalResult` of `huggingface_hub`."""
    from huggingface_hub import EvalResult

    source = (facts.recipe or {}).get("source", {})
    datasets = facts.datasets
    held_out = datasets[0] if datasets else facts.text or "held-out text"
    revision = source.get("revision")
    results = []
    for one in scores(facts):
        prompts = one.kind in ("replacement_score", "completeness_score")
        results.append(
            EvalResult(
                task_type=TASK,
                task_name="Reconstruction of MLP outputs" if not prompts else "Attribution graphs by circuit-tracer",
                dataset_type="prompts" if prompts else held_out,
                dataset_name="prompts" if prompts else f"held-out tokens of {held_out}",
                dataset_split=None if prompts or not datasets else source.get("split"),
                dataset_revision=revision if isinstance(revision, str) and not prompts else None,
                metric_type=one.kind,
                metric_name=one.name,
                metric_value=one.value,
            )
        )
    return results


def score_table(facts: Facts) -> list[str]:
    """Lines of Markdown."""
    return ["| score | |", "| --- | --- |", *(f"| {one.name} | {one.text} |" for one in scores(facts))]


def layer_table(facts: Facts) -> list[str]:
    """The scores of each layer, as lines of Markdown; none where they are not known."""
    by_layer = (facts.evaluation or {}).get("by_layer")
    if not by_layer:
        return []
    numbers = facts.described["model"].get("layers") or range(len(by_layer["l0"]))
    lines = ["| layer | NMSE | explained variance | L0 | dead | ultra-dense |", "| --- " * 6 + "|"]
    columns = (
        ("nmse", ".4f"),
        ("explained_variance", ".4f"),
        ("l0", ".2f"),
        ("dead_fraction", ".2%"),
        ("dense_fraction", ".2%"),
    )
    for row, number in enumerate(numbers):
        cells = (by_layer[key][row] for key, _ in columns)
        texts = ("-" if cell is None else format(cell, form) for cell, (_, form) in zip(cells, columns, strict=True))
        lines.append(f"| {number} | {' | '.join(texts)} |")
    return lines
