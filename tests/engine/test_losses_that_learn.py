"""Parameters of a third party's loss: trained, clipped, saved, resumed, and the same on two ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clt_plugins import read_recipe, run
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.recipe.read import as_toml
from tests.support.commands import on_ranks
from tests.support.helpers import tables
from tests.support.third_party import HEADER

LEARNED = (
    HEADER
    + """
class Loss(torch.nn.Module):
    needs_pre = False
    def __init__(self, config, context):
        super().__init__()
        self.weight = config.weight
        self.level = parameter(torch.zeros((), dtype=context.dtype), feature_axis=None)
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.offset = parameter(torch.zeros(shape, dtype=context.dtype), feature_axis=1)
    def selection(self, tokens, idle_tokens):
        return None
    def forward(self, forward):
        active = forward.sum_features(forward.features.values.tanh().sum()) / forward.features.shape[0]
        return {
            "level": self.weight * (active - self.level).square(),
            "offset": self.weight * forward.sum_features((forward.idle_tokens + 2 - self.offset).square().sum()),
        }

@hookimpl
def clt_losses():
    return [Spec("mine", Config, Loss)]
"""
)
SETTINGS: dict[str, Any] = {
    "transcoder": {"dtype": "float64", "features": 11},
    "losses": [{"name": "mse"}, {"name": "mine", "weight": 0.01}],
    "loggers": [],
    "train": {"steps": 6, "checkpoint_every": 3, "clip_norm": 0.5, "lr": 0.01},
}
NAMES = ("losses[1].level", "losses[1].offset")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06}"


def test_parameters_of_a_loss_are_trained_saved_and_resumed_bit_for_bit(third_party: Any, tmp_path: Path) -> None:
    third_party(LEARNED)
    run(tables(**SETTINGS), out=tmp_path / "whole")
    states = {step: load_file(checkpoint(tmp_path / "whole", step) / "training.safetensors") for step in (3, 6)}
    for name in NAMES:
        assert bool((states[3][name] != 0).all()), "trained, and in the checkpoint"
        assert bool((states[6][name] != states[3][name]).all())
        assert f"exp_avg/{name}" in states[6] or f"exp_avg of {name}" in states[6]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(checkpoint(tmp_path / "resumed", 6))
    shutil.rmtree(tmp_path / "resumed" / "transcoder")
    run(tables(**SETTINGS), out=tmp_path / "resumed", resume="step_000003")
    for file in ("training.safetensors", "transcoder.safetensors"):
        one, other = (load_file(checkpoint(tmp_path / name, 6) / file) for name in ("whole", "resumed"))
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_gradients_of_a_losss_parameters_count_for_the_norm_and_are_clipped(third_party: Any, tmp_path: Path) -> None:
    steep = LEARNED.replace("self.weight * (active - self.level).square()", "1000 * self.level + 0 * active")
    third_party(steep)
    # The first step of Adam is lr · g / (|g| + eps): half of lr for a gradient that was clipped to 1, else almost all.
    chosen = {
        "train": {"steps": 1, "clip_norm": 1.0, "lr": 0.01},
        "optimizer": {"name": "adam", "eps": 1.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
    }
    run(tables(**{**SETTINGS, **chosen, "loggers": ["jsonl"]}), out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("optim/grad_norm", 0) for line in lines) == pytest.approx(1000, rel=1e-2)
    level = load_file(checkpoint(tmp_path / "out", 1) / "training.safetensors")["losses[1].level"]
    assert float(level) == pytest.approx(-0.005, rel=1e-2)


def test_parameters_of_a_loss_learn_the_same_on_two_tensor_ranks(third_party: Any, tmp_path: Path) -> None:
    third_party(LEARNED)
    run(tables(**SETTINGS), out=tmp_path / "one")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(as_toml(read_recipe(tables(**SETTINGS, parallel={"name": "tensor"}))))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
    for done in on_ranks(2, "-m", "clt_plugins", "run", recipe, "--out", tmp_path / "two", PYTHONPATH=path):
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (SlicedTensors.find(checkpoint(tmp_path / name, 6), "training") for name in ("one", "two"))
    assert one.shapes == two.shapes
    for name in NAMES:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-9, atol=1e-12)
