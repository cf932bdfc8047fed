"""The conformance kit on the built-in plugins of which a transcoder and its training consist; none is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import Case, cases, parametrize


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
    expected_failures={"adafactor/no_sync": "torch's own reads numbers back, as its settings say"},
)
def test_optimizers(case: Case) -> None:
    case.run()


@parametrize("schedules", settings={"linear": [{}, {"warmup_steps": 3}], "ramp": [{}, {"delay": 0.2}]})
def test_schedules(case: Case) -> None:
    case.run()


@parametrize("parallel", settings={"tensor": [{}, {"tensor": 1, "data": 2}]})
def test_parallel(case: Case) -> None:
    case.run()


def test_no_choice_is_left_out() -> None:
    """Every choice of the distribution has its cases in `test_built_in_*.py`; crosslayer-coding has its own test."""
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
    others = [here.with_name(f"test_built_in_{part}.py").read_text() for part in ("data", "results", "kernels")]
    files = "".join([here.read_text().split("def test_no_choice")[0], *others])
    for name in sorted(tried - {"crosslayer_coding"}):
        assert f'"{name}"' in files, name
