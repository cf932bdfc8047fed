"""The conformance kit on the built-in plugins for what a run measures, writes and makes of a trained transcoder."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from clt_plugins.testing import Case, parametrize
from tests.support import fake_circuit_tracer


@parametrize("metrics")
def test_metrics(case: Case) -> None:
    case.run()


@parametrize("loggers")
def test_loggers(case: Case) -> None:
    case.run()


NAMED = "circuit-tracer", "gemma-scope-2", "saebench", "saedashboard", "saelens", "transcoder-set"
"""Exporters that must know the language model's name."""


@parametrize("exporters", settings={name: {"model_name": "none"} for name in NAMED})
def test_exporters(case: Case) -> None:
    case.run()


@parametrize("reports")
def test_reports(case: Case) -> None:
    case.run()


@parametrize(
    "stages",
    settings={
        "convert": [
            {"tokens": 64, "calibration_tokens": 64, "tolerance": 3.0},
            {"tokens": 64, "calibration_tokens": 64, "calibrate": False},
        ],
        "evaluate": {"tokens": 256},
        "export": {"format": "safetensors"},
    },
)
def test_stages(case: Case) -> None:
    case.run()


@parametrize(
    "circuits",
    settings={"circuits": {"prompts": ["a prompt"], "python": fake_circuit_tracer.__file__}},
    recipe={"model": {"path": "some/model"}},
)
def test_circuits(case: Case) -> None:
    case.run()


@pytest.fixture(scope="module")
def named_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that names the features that the kit changes, and others."""
    file = tmp_path_factory.mktemp("graphs") / "graph.json"
    pairs = [(layer, feature) for layer in range(2) for feature in range(24)]
    numbers = [(layer + feature) * (layer + feature + 1) // 2 + feature for layer, feature in pairs]
    nodes = [{"feature_type": "cross layer transcoder", "feature": number} for number in numbers]
    file.write_text(json.dumps({"nodes": nodes}))
    return file


@parametrize("feature_files", settings={"feature-json": {"graphs": [__file__]}, "neuronpedia": {"batch": 7}})
def test_feature_files(case: Case, named_features: Path) -> None:
    if case.choice == "feature-json":
        case = attrs.evolve(case, settings={"graphs": [str(named_features)]})
    case.run()


@parametrize("hub", settings={"push": {"repository": "user/clt", "license": "mit", "upload": False}})
def test_hub(case: Case) -> None:
    case.run()
