"""Exports in the formats of circuit-tracer, SAEDashboard and SAEBench, loaded by these tools themselves; and
checkpoints that other trainers wrote, read by us.

`python -m tests.interop` makes the environments and runs these tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from clt_plugins import CrossLayerTranscoder
from tests.interop.common import ACTIVATIONS, MODEL, export, interpreter, make, script

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_reads_a_transcoder_set(activation, skip, tmp_path):
    python = interpreter("circuit-tracer")
    transcoder = make(ACTIVATIONS[activation], {"name": "per_layer", "skip": skip})
    result = script(python, "circuit_tracer_formats_check.py", *export(transcoder, "transcoder-set", tmp_path))
    assert (result["kind"], result["skip"]) == ("TranscoderSet", skip)
    assert result["features"] < 2e-6 and result["decoded"] < 2e-6, result


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_reads_gemma_scope_2_s_files(activation, skip, tmp_path):
    python = interpreter("circuit-tracer")
    transcoder = make(ACTIVATIONS[activation], {"name": "untied", "skip": skip})
    result = script(python, "circuit_tracer_formats_check.py", *export(transcoder, "gemma-scope-2", tmp_path))
    assert (result["kind"], result["skip"]) == ("CrossLayerTranscoder", skip)
    assert result["features"] < 2e-6 and result["decoded"] < 2e-6, result


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sae_dashboard_opens_every_layer_of_any_tying(activation, tmp_path):
    python = interpreter("sae-dashboard")
    transcoder = make(ACTIVATIONS[activation], {"name": "per_source", "feature_scale": True})
    result = script(python, "sae_dashboard_check.py", *export(transcoder, "saedashboard", tmp_path))
    assert len(result["features"]) == 6 and max(result["features"]) < 2e-6, result
    assert result["hook"] == "blocks.5.ln2.hook_normalized"


def test_sae_dashboard_makes_dashboards_of_the_shipped_model(tmp_path):
    python = interpreter("sae-dashboard")
    transcoder = make(ACTIVATIONS["jumprelu"], {"name": "untied"})
    result = script(python, "sae_dashboard_check.py", *export(transcoder, "saedashboard", tmp_path), MODEL)
    assert result["dashboards"] == 4 and min(result["active"].values()) > 0 and min(result["bars"].values()) > 0, result


def test_sae_bench_takes_every_layer(tmp_path):
    python, checkout = interpreter("sae-bench"), os.environ.get("CLT_SAE_BENCH", "")
    transcoder = make(ACTIVATIONS["jumprelu"], {"name": "per_target"})
    result = script(python, "sae_bench_check.py", *export(transcoder, "saebench", tmp_path), checkout)
    assert max(result["features"]) == 0 and max(result["decoded"]) < 2e-6, result


ACT_FNS = ("relu", "jumprelu", "topk", "layertopk", "batchtopk", "batchlayertopk")


def written(python: str, name: str, folder, *arguments) -> None:
    """A checkpoint that another trainer wrote is read: features and outputs are what it computed."""
    script(python, name, folder, *arguments)
    truth = load_file(folder / "expected.safetensors")
    transcoder = CrossLayerTranscoder.load(folder / "checkpoint", kernels="torch")
    with torch.no_grad():
        features, outputs = transcoder.encode(truth["inputs"]).dense(), transcoder(truth["inputs"])
    for computed, expected in ((features, truth["features"]), (outputs, truth["outputs"])):
        assert (computed - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("by_norm", ["by-norm", "raw"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_llamascopium_s_checkpoint_is_read(act_fn, by_norm, tmp_path):
    written(interpreter("llamascopium"), "trainers/write_llamascopium.py", tmp_path, act_fn, by_norm)


@pytest.mark.parametrize("crossing", ["crossing", "alone"])
def test_clt_forge_s_checkpoint_is_read(crossing, tmp_path):
    python, checkout = interpreter("clt-forge"), os.environ.get("CLT_CLT_FORGE", "")
    written(python, "trainers/write_clt_forge.py", tmp_path, crossing, checkout)


@pytest.mark.parametrize("tuned", ["tuned", "plain"])
@pytest.mark.parametrize("form", ["pairs", "per_source", "concat", "alone"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_clt_training_s_checkpoint_is_read(activation, form, tuned, tmp_path):
    python, checkout = interpreter("clt-training"), os.environ.get("CLT_CLT_TRAINING", "")
    written(python, "trainers/write_clt_training.py", tmp_path, form, tuned, activation, checkout)
