"""Formats of other tools: a miniature of each is read, computes what its tool computes, and is written on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Faults
from tests.support.exports import circuit_tracer_forward, close, export, inputs, load
from tests.support.formats import MINIATURES, MODEL, D, F, L, Truth



@pytest.fixture
def miniature(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Truth]:
    folder = tmp_path / "miniature"
    folder.mkdir()
    return folder, MINIATURES[request.param](folder)


@pytest.mark.parametrize("miniature", MINIATURES, indirect=True)
def test_what_is_read_computes_what_its_tool_computes(miniature: tuple[Path, Truth]) -> None:
    folder, truth = miniature
    x = inputs()
    features, outputs = truth.features(x), truth.outputs(x)
    assert 0.05 < (features > 0).float().mean() < 0.9 and outputs.std() > 0.5, "a miniature that does something"
    for lazy in (True, False, None):
        try:
            loaded = load(folder, lazy=lazy)
        except Faults as refused:
            assert lazy is False and "adds offsets to active features" in str(refused)
            continue
        for dense in (True, False):
            loaded.runs_dense = dense
            with torch.no_grad():
                close(loaded.encode(x).dense(), features, 1e-6)
                close(loaded(x), outputs, 2e-6)
        described = {name: loaded.choices[name].name for name in ("activation", "tying")}
        assert described == {"activation": truth.activation, "tying": truth.tying}
        hooks = loaded.model_described().get("hooks", {})
        assert (hooks.get("input"), hooks.get("output")) == truth.hooks
