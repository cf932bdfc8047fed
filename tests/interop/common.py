"""What the tests of other tools share: transcoders to export, and the tools' own Python."""

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
from tests.interop.environments import PEERS, NotInstalled
from tests.support.helpers import parts, plugins, random_batch, stir

SCRIPTS = Path(__file__).parent / "peers"
MODEL = Path(__file__).parents[2] / "examples/models/stdlib-gpt2"
JUMPRELU = {"name": "jumprelu", "threshold": 0.2}
ACTIVATIONS: dict[str, dict[str, Any]] = {"relu": {"name": "relu"}, "jumprelu": JUMPRELU}
TYINGS: dict[str, dict[str, Any]] = {
    "untied": {"name": "untied"},
    "per_source": {"name": "per_source", "feature_scale": True},
    "per_target": {"name": "per_target", "feature_scale": True},
}


def interpreter(name: str) -> str:
    """The Python interpreter that has a tool; without one the test is skipped, with the remedy."""
    peer = PEERS[name]
    python = os.environ.get(peer.variable, sys.executable)
    if not python or subprocess.run([python, "-c", f"import {peer.module}"], capture_output=True).returncode:
        pytest.skip(f"{name} is not installed: `python -m tests.interop`, or name its Python in {peer.variable}")
    return python


def checkout(name: str) -> Path:
    """The checkout of a tool; without one the test is skipped, with the remedy."""
    try:
        path = PEERS[name].checkout()
    except NotInstalled as why:
        pytest.skip(str(why))
    assert path is not None
    return path


def script(python: str, name: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script prints last. The script must not see this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, str(SCRIPTS / name), *map(str, arguments)]
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
