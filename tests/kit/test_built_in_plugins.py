"""The conformance kit on every built-in plugin but kernels (`test_built_in_kernels.py`, which takes as long) and
`crosslayer-coding` (a source and an exporter), which has its own test, with its data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import Case, cases, parametrize
from tests.support import fake_circuit_tracer
from tests.support.serving import Serving
from tests.support.stored_data import write_numbered

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "stdlib-gpt2"


@parametrize(
    "activations",
    settings={
        "relu": {},
        "jumprelu": [{"threshold": 0.2, "bandwidth": 0.3}, {"threshold": 0.2, "bandwidth": 1.0, "target_l0": 6.0}],
        "topk": [{"k": 4}, {"k": 2, "scope": "layer", "ranking": "norm"}, {"k": 0.11}, {"k": [2, 0.11, 1]}],
        "batchtopk": [
            {"k": 5},
            {"k": 5, "ranking": "norm"},
            {"k": 2, "scope": "layer", "ranking": "zscore"},
            {"k": [2, 5, 1], "ranking": "zscore"},
        ],
        "groupmax": {"k": 6},
    },
    expected_failures={
        f"jumprelu#{number}/own_gradient": "the threshold's gradient is a straight-through estimate"
        for number in (1, 2)
    },
)
def test_activations(case: Case) -> None:
    case.run()


@parametrize(
    "encoders",
    settings={
        "plain": [{}, {"pre_bias": True}],
        "tied": [{}, {"normalise": True, "scale": True}],
        "low_rank": {"rank": 3},
    },
)
def test_encoders(case: Case) -> None:
    case.run()


@parametrize(
    "normalisations",
    settings={
        "whitening": [{}, {"method": "pca", "shrinkage": 0.0}, {"sides": "inputs"}, {"sides": "targets"}],
        "rms": {},
    },
)
def test_normalisations(case: Case) -> None:
    case.run()


@parametrize(
    "tyings",
    settings={
        "untied": [{}, {"skip": True}],
        "per_source": [{}, {"feature_offset": True, "feature_scale": True, "skip": True}],
        "per_layer": [{}, {"skip": True}],
        "per_target": [{}, {"feature_scale": True}, {"feature_offset": True, "feature_scale": True}],
    },
)
def test_tyings(case: Case) -> None:
    case.run()


@parametrize(
    "callbacks",
    settings={
        "resample": [{"every": 1, "until": 1.0}, {"every": 2, "encoder_scale": 1.0, "until": 1.0}],
        "decoder_norm": [{"norm": 0.5}, {"norm": 0.5, "how": "exactly", "compensate": True}],
        "ema": {"every": 1, "decay": 0.9},
        "early_stopping": [{}, {"patience": 1, "change": 1e6}],
        "active_subspace": [{"variance": 0.9}, {"dimensions": 3}],
        "exemplar_start": [{}, {"tokens_per_feature": 1.5}],
        "fit_decoder": [{"tokens": 48}, {"tokens": 20, "iterations": 2, "ridge": 0.0}],
    },
)
def test_callbacks(case: Case) -> None:
    case.run()


@parametrize(
    "losses",
    settings={
        "mse": [{}, {"scale": "raw"}],
        "tanh_sparsity": {"weight": 0.1, "weight_schedule": {"name": "constant", "warmup_steps": 0}},
        "preactivation": [{"weight": 0.3}, {"weight": 0.3, "scope": "all"}],
        "auxk": {"weight": 0.5, "k": 3},
        "matryoshka": {},
        "hierarchical": [{}, {"per": "token"}],
        "depth": [{"weight": 0.1}, {"weight": 0.1, "power": 1.0, "draws": 2}],
    },
    expected_failures={"auxk/gradient_reconstruction": "the residual is detached on purpose (Gao et al. 2024, A.2)"},
)
def test_losses(case: Case) -> None:
    if case.choice == "l0":
        pytest.skip("it needs an activation with thresholds: see below")
    case.run()


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in cases(
            "losses",
            settings={"l0": {"target": 3.0, "frequency_weight": 0.1}},
            recipe={"activation": {"name": "jumprelu", "threshold": 0.2, "bandwidth": 0.3}},
        )
        if case.choice == "l0"
    ],
    ids=str,
)
def test_the_loss_that_trains_thresholds(case: Case) -> None:
    case.run()


@parametrize(
    "optimizers",
    settings={
        "adam": [{}, {"states": "bf16"}, {"roles": {"bias": {"lr_factor": 0.5}, "decoder": {"weight_decay": 0.1}}}],
        "adamw": {"weight_decay": 0.1},
        "rowwise_adam": {"weight_decay": 0.1},
        "muon": [{}, {"adjust_lr": "original", "nesterov": False}],
    },
)
def test_optimizers(case: Case) -> None:
    case.run()


@parametrize("schedules", settings={"linear": [{}, {"warmup_steps": 3}], "ramp": [{}, {"delay": 0.2}]})
def test_schedules(case: Case) -> None:
    case.run()


@parametrize("synthetic", settings={"synthetic": {"layers": 2, "d_model": 5, "features": 9, "noise": 0.1}})
def test_synthetic(case: Case) -> None:
    case.run()


@parametrize(
    "planted",
    settings={
        "planted": [
            {"layers": 2, "d_model": 9, "chains": 7, "noise": 0.1},
            {"hops": 3, "gates": ["and", "or", "and_not"], "consume": True, "activity": "hierarchical", "norms": 10.0},
            {"activity": "correlated"},
        ],
        "recovery": {"tokens": 64},
    },
    recipe={"source": {"name": "planted", "d_model": 6, "chains": 4, "hops": 2, "active": 2.0}},
)
def test_planted(case: Case) -> None:
    case.run()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of different lengths, no two with a line in common."""
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    words = [[f"number_{doc}_{word} = {doc * word}" for word in range(5 + doc % 17)] for doc in range(120)]
    file.write_text("\n".join(json.dumps({"text": "\n".join(lines)}) for lines in words))
    return file


@parametrize(
    "stream",
    settings={"stream": {"text": "documents.jsonl", "context": 16, "model_batch": 2, "buffer_tokens": 48}},
    recipe={"model": {"path": str(MODEL)}},
)
def test_stream(case: Case, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    case.run()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the data set `data`."""
    folder = tmp_path_factory.mktemp("stored")
    write_numbered(folder / "data", [90, 70, 60], held_out=40)
    return folder


@pytest.fixture(scope="module")
def served(stored: Path) -> Iterator[str]:
    """The address of a server of that data set."""
    server = Serving(stored)
    yield server.url
    server.stop()


@parametrize(
    "datasets",
    settings={
        "local": {"path": "data", "buffer_tokens": 64},
        "remote": {"url": "http://127.0.0.1:9", "dataset": "data", "buffer_tokens": 64},
    },
)
def test_datasets(case: Case, stored: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    if case.choice == "remote":  # its port is known only now
        case = attrs.evolve(case, settings={**case.settings, "url": served})
    case.run()


@parametrize("transforms", settings={"drop_outliers": {"factor": 1.25}, "drop_tokens": {"ids": [3, 4, 5, 6, 7]}})
def test_transforms(case: Case) -> None:
    case.run()


@parametrize("metrics")
def test_metrics(case: Case) -> None:
    case.run()


@parametrize("loggers")
def test_loggers(case: Case) -> None:
    case.run()


@parametrize("parallel")
def test_parallel(case: Case) -> None:
    case.run()


NAMED = "circuit-tracer", "gemma-scope-2", "saebench", "saedashboard", "saelens", "transcoder-set"
"""Exporters that must know the language model's name."""


@parametrize("exporters", settings={name: {"model_name": "none"} for name in NAMED})
def test_exporters(case: Case) -> None:
    case.run()


@parametrize(
    "collect",
    settings={"collect": {"tokens": 60, "top": 3, "groups": 2, "per_group": 2, "window": 2}},
    recipe={
        "model": {"path": str(MODEL)},
        "source": {
            "name": "stream", "text": "documents.jsonl", "context": 16, "model_batch": 2, "buffer_tokens": 48,
            "held_out": 0.3,
        },
    },
)  # fmt: skip
def test_collect(case: Case, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
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


def test_no_choice_is_left_out() -> None:
    """Every choice of the distribution has its cases in this file, or in those of kernels and crosslayer-coding."""
    tried = {"activations", "tyings", "losses", "synthetic", "stream", "datasets", "loggers", "kernels", "parallel"}
    tried |= {
        "transforms",
        "normalisations",
        "encoders",
        "metrics",
        "exporters",
        "reports",
        "stages",
        "hub",
        "crosslayer_coding",
        "optimizers",
        "schedules",
        "callbacks",
        "circuits",
        "feature_files",
        "collect",
        "planted",
    }
    loaded = load_plugins()
    offered = {choice.plugin for slot in BY_TABLE for choice in loaded.choices(slot).values()}
    built_in = {info.name for info in loaded.infos if info.distribution.split()[0] == "clt-plugins"}
    assert offered & built_in == tried
    here = Path(__file__)
    files = here.read_text().split("def test_no_choice")[0] + here.with_name("test_built_in_kernels.py").read_text()
    for name in sorted(tried - {"crosslayer_coding"}):
        assert f'"{name}"' in files, name
