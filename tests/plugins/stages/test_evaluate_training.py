"""Where training moves each number of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import run
from clt_plugins.files.records import as_data
from clt_stages import EvaluateConfig
from clt_stages.evaluate import Evaluation, evaluate
from tests.support.helpers import parts, tables

SHIPPED = Path(__file__).parents[3] / "examples/models/stdlib-gpt2"
UNMOVED = ("model", "with_errors", "mean", "zero")

# Where training takes each number of a report, by its path there: "falls", "rises", "stays" (to the last bit, but for
# rounding); of a list, in every layer. None: either, as chance has it.
SPLICED: dict[str, str | None] = {
    "tokens": "stays",
    "nmse": "falls",
    "by_layer.nmse": "falls",
    "explained_variance": "rises",
    "by_layer.explained_variance": "rises",
    "dead_fraction": "rises",  # nothing here revives features, and of random ones hardly any is never chosen
    "by_layer.dead_fraction": "rises",
    "dense_above": "stays",
    "density_histogram.log10_edges": "stays",
    "lower_quartile_of_density": "falls",
    "model.tokens": "stays",
    "model.cross_entropy.transcoder": "falls",
    "model.kl.transcoder": "falls",
    "model.top1.transcoder": "rises",
    "model.ce_recovered": "rises",
    "model.ce_recovered_of_mean": "rises",
    "model.largest_logit_error_with_errors": "stays",
    # What does not depend on the transcoder, or only by errors that cancel.
    **{f"model.{of}.{name}": "stays" for of in ("cross_entropy", "kl", "top1") for name in UNMOVED},
}
TRAINED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, str | None]]] = {
    # k is given; a random encoder spreads it over its features by chance, a trained one has frequent and rare ones.
    "batchtopk": (
        {"name": "batchtopk", "k": 12},
        [{"name": "mse"}],
        {
            "l0": "stays",
            "by_layer.l0": None,  # the layers share k out anew
            "dense_fraction": "rises",
            "by_layer.dense_fraction": None,  # few features are dense, in some layers none
            "density_histogram.frequent": "rises",
            "density_histogram.rare": "falls",
        },
    ),
    # The penalty makes features rare that a random encoder activates at every tenth token.
    "jumprelu": (
        {"name": "jumprelu", "threshold": 0.5, "bandwidth": 0.5},
        [
            {"name": "mse"},
            {"name": "tanh_sparsity", "weight": 0.05, "weight_schedule": {"name": "constant", "warmup_steps": 0}},
        ],
        {
            "l0": "falls",
            "by_layer.l0": "falls",
            "dense_fraction": "falls",
            "by_layer.dense_fraction": "falls",
            "density_histogram.frequent": "falls",
            "density_histogram.rare": "rises",
        },
    ),
}


def numbers(report: Evaluation) -> dict[str, Any]:
    """Every number and list of a report by its dotted path; of what is counted by feature, a summary."""
    density = report.density
    assert density is not None
    assert float(density.sum()) == pytest.approx(report.l0)
    assert float((density == 0).double().mean()) == pytest.approx(report.dead_fraction)
    out: dict[str, Any] = {"lower_quartile_of_density": float(density.flatten().quantile(0.25))}

    def walk(table: dict[str, Any], above: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{above}{name}.")
            else:
                out[above + name] = value

    data = as_data(report)
    assert data.pop("notes") == [] and data.pop("made_from") is None
    walk(data, "")
    edges = out["density_histogram.log10_edges"]
    counts = torch.tensor(out.pop("density_histogram.counts")).sum(0)
    frequent = torch.tensor(edges[:-1]) >= -1.5
    out["density_histogram.frequent"] = int(counts[frequent].sum())
    out["density_histogram.rare"] = int(counts[~frequent].sum())
    return out


EVERY = {"log_every": 40, "eval_every": 40, "checkpoint_every": 40}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if n else []) for n, name in enumerate(TRAINED)]
)
def test_training_moves_every_number_in_the_direction_it_should(name, tmp_path):
    activation, losses, directions = TRAINED[name]
    chosen = tables(
        model={"path": str(SHIPPED)},
        source={"name": "stream", "context": 64, "buffer_tokens": 4096},
        transcoder={"features": 256},
        activation=activation,
        losses=losses,
        train={"steps": 40, "batch_tokens": 512, "statistics_tokens": 4096, "lr": 4e-3, **EVERY},
    )
    config = EvaluateConfig(tokens=2048, model_tokens=1024, dense_above=0.05)
    trained = run(chosen, out=tmp_path / "run")
    fresh = parts(**chosen)
    fresh.transcoder.normaliser.load_state_dict(trained.normaliser.state_dict())
    before, after = (numbers(evaluate(each, fresh.source, config)) for each in (fresh.transcoder, trained))
    directions = {**SPLICED, **directions}
    assert before.keys() == after.keys() == directions.keys(), "a direction for every number, and none for another"
    for path, direction in directions.items():
        old, new = (each if isinstance(each, list) else [each] for each in (before[path], after[path]))
        for a, b in zip(old, new, strict=True):
            if direction == "stays":
                assert b == pytest.approx(a, rel=1e-5, abs=1e-5), path
            elif direction is not None:
                assert (b < a) if direction == "falls" else (b > a), (path, a, b)
    # Well beyond chance, where it counts.
    assert after["nmse"] < 0.8 * before["nmse"]
    assert after["model.ce_recovered"] > before["model.ce_recovered"] + 0.1
    for inside in (before, after):
        assert inside["model.cross_entropy.with_errors"] == pytest.approx(inside["model.cross_entropy.model"], abs=1e-5)
        assert inside["model.cross_entropy.model"] < inside["model.cross_entropy.transcoder"]
        assert inside["model.cross_entropy.model"] < inside["model.cross_entropy.mean"]
        assert inside["model.largest_logit_error_with_errors"] <= 1e-4
