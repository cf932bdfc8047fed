"""circuit-tracer's folder: what it computes is what the transcoder computes, and what is read back is the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.exports import (
    ACTIVATIONS,
    METHODS,
    SHARED,
    TYINGS,
    D,
    F,
    L,
    circuit_tracer_forward,
    close,
    export,
    inputs,
    load,
    make,
)
from tests.support.helpers import read_tensors

CASES = list(itertools.product(TYINGS, METHODS, ("relu", "jumprelu")))


@pytest.mark.parametrize(("tying", "normalisation", "activation"), CASES)
def test_a_circuit_tracer_folder_computes_the_same_and_comes_back_the_same(tying, normalisation, activation, tmp_path):
    transcoder = make(ACTIVATIONS[activation], TYINGS[tying], normalisation)
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    x = inputs()
    wanted = transcoder(x).detach()
    assert wanted.std() > 0.5, "something is reconstructed"
    close(circuit_tracer_forward(folder, x), wanted, 1e-5)
    again = load(folder)
    assert again.choices["activation"].name == activation
    close(again(x).detach(), wanted, 1e-5)
    close(again.encode(x).dense().detach(), transcoder.encode(x).dense().detach(), 1e-5)


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_in_bfloat16_it_comes_back_to_a_hundredth(tying, activation, tmp_path):
    transcoder = make(ACTIVATIONS[activation], TYINGS[tying])
    folder = export(transcoder, "circuit-tracer", tmp_path / "out", dtype="bfloat16")
    assert load_file(folder / "W_dec_0.safetensors")["W_dec_0"].dtype == torch.bfloat16
    x = inputs()
    with torch.no_grad():
        # Features so near their threshold that rounding decides are another question.
        near = transcoder.encode(x).dense() - load(folder).encode(x).dense()
        sure = near.abs().amax((1, 2)) < 0.1
        found, wanted = load(folder)(x), transcoder(x)
    assert sure.float().mean() > 0.7
    assert (found - wanted)[sure].norm() <= 1e-2 * wanted[sure].norm()


def test_an_offset_turns_relu_into_thresholds(tmp_path):
    transcoder = make({"name": "relu"}, SHARED)
    with torch.no_grad():
        transcoder.tying.offset.copy_(transcoder.tying.offset[:1].expand(L, -1))
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    close(circuit_tracer_forward(folder, inputs()), transcoder(inputs()).detach(), 1e-5)
    with pytest.raises(ValueError, match=r"threshold_\d\[\d\] is -.* below zero"):
        load(folder)


def test_a_folder_as_other_trainers_write_it_has_biases_of_zero_and_a_json_file(tmp_path):
    """ByteDance's: no biases, decoder norms beside the weights, and `config.json`."""
    transcoder = make()
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    for i in range(L):
        path = folder / f"W_enc_{i}.safetensors"
        save_file({name: value for name, value in read_tensors(path).items() if not name.startswith("b_")}, path)
        path = folder / f"W_dec_{i}.safetensors"
        rows = read_tensors(path)
        save_file({**rows, f"W_dec_norm_{i}": rows[f"W_dec_{i}"].norm(dim=-1)}, path)
    (folder / "config.yaml").unlink()
    (folder / "config.json").write_text(json.dumps({"model_name": "some/model"}))
    again = load(folder)
    assert again.model_described()["path"] == "some/model"
    assert not again.b_enc.any() and not again.tensors()["b_dec"].any()
    whole = load(export(transcoder, "circuit-tracer", tmp_path / "whole"))
    assert torch.equal(again.W_enc, whole.W_enc)
    assert all(torch.equal(again.tying.expand(i), whole.tying.expand(i)) for i in range(L))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable JSON file"):
        load(folder)


def test_faults_in_a_circuit_tracer_folder_are_named(tmp_path):
    def faulty(name: str) -> Path:
        return export(make(), "circuit-tracer", tmp_path / name)

    folder = faulty("missing")
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"W_dec_1.safetensors: missing"):
        load(folder)
    folder = faulty("damaged")
    (folder / "W_enc_2.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"W_enc_2.safetensors: not a readable safetensors file"):
        load(folder)
    folder = faulty("shape")
    save_file({"W_dec_1": torch.zeros(F, L, D)}, folder / "W_dec_1.safetensors")
    with pytest.raises(ValueError, match=r"'W_dec_1' is \[10, 3, 6\], expected \[10, 2, 6\]"):
        load(folder)
    folder = faulty("other")
    (folder / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(ValueError, match="a 'transcoder_set', not a cross_layer_transcoder"):
        load(folder)
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: not a transcoder: no transcoder.json"):
        load(tmp_path / "empty")
