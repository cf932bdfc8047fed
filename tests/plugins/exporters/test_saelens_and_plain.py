"""SAELens's folders and the plain file: what they compute is what the transcoder computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.exports import ACTIVATIONS, MODEL, TYINGS, D, L, close, export, inputs, make


def test_saelens_folders_hold_each_layer_s_part(tmp_path):
    transcoder = make(tying={"name": "per_source", "skip": True})
    folder = export(transcoder, "saelens", tmp_path / "out")
    x = inputs()
    acts = transcoder.encode(x).dense().detach()
    scale, shift = (transcoder.statistics()[f"target_{name}"] for name in ("scale", "shift"))
    affine = transcoder.tying.affine(transcoder.normaliser.inputs(x)).detach()
    for i in range(L):
        described = json.loads((folder / f"layer_{i:02}" / "cfg.json").read_text())
        assert described["architecture"] == "jumprelu_skip_transcoder"
        assert described["metadata"]["hook_name"] == f"blocks.{i}.mlp.hook_in"
        assert described["metadata"]["hook_name_out"] == f"blocks.{i}.hook_mlp_out"
        sae = load_file(folder / f"layer_{i:02}" / "sae_weights.safetensors")
        pre = x[:, i] @ sae["W_enc"] + sae["b_enc"]
        encoded = pre.relu() * (pre > sae["threshold"])
        close(encoded, acts[:, i], 1e-5)
        written = acts[:, i] @ transcoder.tying.expand(i)[:, 0]
        expected = (written + affine[:, i]) * scale[i] + shift[i]
        close(encoded @ sae["W_dec"] + sae["b_dec"] + x[:, i] @ sae["W_skip"].T, expected.detach(), 1e-5)


@pytest.mark.parametrize("tying", [*TYINGS, "skip"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_plain_file_computes_the_same(tying, activation, tmp_path):
    chosen = {**TYINGS, "skip": {"name": "untied", "skip": True}}[tying]
    transcoder = make(ACTIVATIONS[activation], chosen)
    folder = export(transcoder, "safetensors", tmp_path / "out")
    tensors = load_file(folder / "clt.safetensors")
    x = inputs()
    out = tensors["b_dec"].expand(len(x), L, D).clone()
    for s in range(L):
        pre = x[:, s] @ tensors["W_enc"][s].T + tensors["b_enc"][s]
        acts = pre * (pre > tensors["threshold"][s]) if "threshold" in tensors else pre.relu()
        out[:, s:] += torch.einsum("bf,ftd->btd", acts, tensors[f"W_dec.{s:02}"])
        if "W_skip" in tensors:
            out[:, s] += x[:, s] @ tensors["W_skip"][s]
    close(out, transcoder(x).detach(), 1e-5)
    assert json.loads((folder / "clt.json").read_text())["model"] == MODEL
