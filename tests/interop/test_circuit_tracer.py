"""Exports loaded by circuit-tracer itself, of its git repository: by name and by path, with both of its backends.

`CLT_CIRCUIT_TRACER=/path/to/circuit-tracer python -m tests.interop --only circuit-tracer` makes its environment and
runs these tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clt_plugins import run
from tests.interop.common import ACTIVATIONS, JUMPRELU, MODEL, TYINGS, export, interpreter, make, script
from tests.support.helpers import tables

pytestmark = pytest.mark.interop
CHECK = "circuit_tracer_check.py"


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_computes_the_same(tying, activation, tmp_path):
    python = interpreter("circuit-tracer")
    folder, expected = export(make(ACTIVATIONS[activation], TYINGS[tying]), "circuit-tracer", tmp_path)
    result = script(python, CHECK, folder, "--expected", expected)
    assert result["fault"] is None
    for loader in ("traced", "lazy", "eager"):
        assert result[f"{loader}_features"] < 2e-6 and result[f"{loader}_decoded"] < 2e-6, result


@pytest.mark.parametrize("name, tying", [("transcoder-set", "per_layer"), ("gemma-scope-2", "untied")])
def test_it_computes_the_same_with_a_skip_path(name, tying, tmp_path):
    python = interpreter("circuit-tracer")
    folder, expected = export(make(JUMPRELU, {"name": tying, "skip": True}), name, tmp_path)
    result = script(python, CHECK, folder, "--expected", expected, "--model", MODEL)
    assert result["traced_features"] < 2e-6 and result["traced_decoded"] < 2e-6, result
    assert 0 < result["graph"]["replacement"] < 1


def traced(python: str, folder: Path, model: Path, backend: str) -> dict:
    graph = script(python, CHECK, folder, "--model", model, "--backend", backend)["graph"]
    assert graph["logits_differ"] < 2e-6, "the model in circuit-tracer is ours"
    assert graph["features_differ"] < 2e-6, "it reads what our hooks mean"
    assert graph["features"] > 0 and graph["edges"] > 0
    assert 0 < graph["replacement"] < 1 and 0 < graph["completeness"] < 1
    return graph


def test_it_traces_the_shipped_model(tmp_path):
    python = interpreter("circuit-tracer")
    folder, _ = export(make(JUMPRELU, TYINGS["untied"]), "circuit-tracer", tmp_path)
    traced(python, folder, MODEL, "transformerlens")


def test_both_backends_make_the_same_graph(tmp_path):
    """Of a Llama: the backend nnsight knows Llama, Gemma, Qwen and GPT-OSS, and not the shipped GPT-2."""
    python = interpreter("circuit-tracer")
    folder, _ = export(make(JUMPRELU, TYINGS["untied"]), "circuit-tracer", tmp_path)
    model = tmp_path / "llama"
    script(python, "tiny_llama.py", model, MODEL)
    one, other = (traced(python, folder, model, backend) for backend in ("transformerlens", "nnsight"))
    assert one["active_features"] == other["active_features"]
    assert one["replacement"] == pytest.approx(other["replacement"], rel=1e-3)
    assert one["completeness"] == pytest.approx(other["completeness"], rel=1e-3)


def test_the_stage_circuits_records_its_scores(tmp_path):
    stage = {"name": "circuits", "prompts": ["import os", "def f("], "python": interpreter("circuit-tracer")}
    recipe = tables(
        source={"name": "synthetic", "layers": 6, "d_model": 128},
        activation={"name": "jumprelu", "threshold": 0.05},
        model={"path": str(MODEL)},
        stages=[stage],
    )
    run(recipe, out=tmp_path / "run")
    record = json.loads((tmp_path / "run/circuits/circuits.json").read_text())
    assert record["versions"]["transformer-lens"] == "2.18.0"
    for graph in record["graphs"]:
        assert 0 < graph["replacement"] < 1 and 0 < graph["completeness"] < 1
        shown = json.loads((tmp_path / f"run/circuits/graphs/{graph['slug']}.json").read_text())
        assert shown["metadata"]["scan"] == "/stdlib-gpt2" and shown["links"]
        kinds = [node["feature_type"] for node in shown["nodes"]]
        assert kinds.count("cross layer transcoder") <= graph["pruned_features"]
