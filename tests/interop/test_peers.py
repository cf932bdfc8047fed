"""Exports, loaded by the tools that they are for, each in its own environment.

The variables `CLT_CIRCUIT_TRACER_PYTHON`, `CLT_SAE_LENS_PYTHON` and `CLT_CROSSLAYER_CODING_PYTHON` name the Python
interpreters of these environments; without a variable, the interpreter of the tests is tried. A test is skipped if its
package is not installed. examples/circuit_tracing.md says which versions work together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clt_plugins import CrossLayerTranscoder
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.helpers import parts, plugins, random_batch, stir

PEERS = Path(__file__).parent / "peers"
MODEL = Path(__file__).parents[2] / "examples/models/stdlib-gpt2"
JUMPRELU = {"name": "jumprelu", "threshold": 0.2}
TYINGS: dict[str, dict[str, Any]] = {
    "untied": {"name": "untied"},
    "per_source": {"name": "per_source", "feature_scale": True},
    "per_target": {"name": "per_target", "feature_scale": True},
}


def interpreter(variable: str, module: str) -> str:
    """A Python interpreter that has a package; without one the test is skipped, with the remedy."""
    python = os.environ.get(variable, sys.executable)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{module} is not installed in {python}: name the Python of an environment with it in {variable}")
    return python


def script(python: str, name: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script prints last. The script must not see this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, str(PEERS / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def make(activation: dict[str, Any], tying: dict[str, Any], normalisation: str = "mean_std") -> CrossLayerTranscoder:
    """A stirred transcoder of the shipped model's shape, for activations that are far from standardised."""
    transcoder = parts(
        source={"name": "synthetic", "layers": 6, "d_model": 128, "features": 200, "active": 2.0},
        activation=activation,
        tying=tying,
        normalisation={"name": normalisation},
        transcoder={"features": 64},
    ).transcoder
    stir(transcoder, scale=0.05)
    fit_to_batches(transcoder, [skewed(64)])
    transcoder.described_model = {"path": str(MODEL)}
    return transcoder.eval()


def skewed(tokens: int):
    batch = random_batch(tokens, 6, 128, seed=2)
    return type(batch)(batch.inputs * 3 + 1.5, batch.targets * 2 - 1)


@torch.no_grad()
def export(transcoder: CrossLayerTranscoder, name: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """The exported folder, and a file of inputs and what the transcoder computes of them."""
    out = folder / name
    out.mkdir()
    chosen = structure_choice(plugins(), "exports", {"name": name, **settings})
    build(chosen, transcoder.context).export(transcoder, out)
    x = skewed(24).inputs
    normaliser, tying = transcoder.normaliser, transcoder.tying
    acts = transcoder.encode(x).dense()
    affine = tying.affine(normaliser.inputs(x)).expand(24, 6, 128)
    own_layer = torch.stack([acts[:, layer] @ tying.expand(layer)[:, 0] for layer in range(6)], 1) + affine
    tensors = {
        "inputs": x,
        "features": acts,
        "decoded": transcoder(x),
        "own_decoded": normaliser.restore(own_layer),
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    return out, folder / "expected.safetensors"


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_circuit_tracer_computes_the_same(tying, activation, tmp_path):
    python = interpreter("CLT_CIRCUIT_TRACER_PYTHON", "circuit_tracer")
    transcoder = make(JUMPRELU if activation == "jumprelu" else {"name": "relu"}, TYINGS[tying])
    folder, expected = export(transcoder, "circuit-tracer", tmp_path)
    result = script(python, "circuit_tracer_graph.py", folder, "--expected", expected)
    for name in ("lazy_features", "lazy_decoded", "eager_features", "eager_decoded"):
        assert result[name] < 1e-5, result


@pytest.mark.slow
def test_circuit_tracer_makes_a_graph_of_the_shipped_model(tmp_path):
    python = interpreter("CLT_CIRCUIT_TRACER_PYTHON", "circuit_tracer")
    transcoder = make(JUMPRELU, TYINGS["untied"])
    folder, _ = export(transcoder, "circuit-tracer", tmp_path)
    graph = script(python, "circuit_tracer_graph.py", folder, "--model", MODEL)["graph"]
    assert graph["active_features"] > 0 and graph["edges"] > 0
    assert graph["logits_differ"] < 1e-3, "the model in circuit-tracer is the shipped one"
    assert 0 <= graph["replacement_score"] <= 1 and 0 <= graph["completeness_score"] <= 1


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_sae_lens_computes_the_same(activation, skip, tmp_path):
    python = interpreter("CLT_SAE_LENS_PYTHON", "sae_lens")
    chosen = JUMPRELU if activation == "jumprelu" else {"name": "relu"}
    transcoder = make(chosen, {"name": "per_source", "feature_scale": True, "skip": skip})
    folder, expected = export(transcoder, "saelens", tmp_path)
    result = script(python, "sae_lens_check.py", folder, expected)
    assert max(result["features"]) < 1e-5, result
    if not skip:
        assert max(result["decoded"]) < 1e-5, result
    kind = ("jumprelu_" if activation == "jumprelu" else "") + ("skip_transcoder" if skip else "transcoder")
    assert set(result["architectures"]) == {kind}


@pytest.mark.parametrize("tying", [*TYINGS, "affine"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_reference_library_computes_the_same(tying, activation, tmp_path):
    python = interpreter("CLT_CROSSLAYER_CODING_PYTHON", "clt")
    affine = {"name": "per_target", "feature_offset": True, "feature_scale": True, "skip": True}
    chosen = JUMPRELU if activation == "jumprelu" else {"name": "relu"}
    transcoder = make(chosen, {**TYINGS, "affine": affine}[tying])
    folder, expected = export(transcoder, "crosslayer-coding", tmp_path)
    assert script(python, "reference_check.py", folder, expected)["decoded"] < 1e-5
