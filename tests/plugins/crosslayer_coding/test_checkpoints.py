"""Checkpoints of crosslayer-coding: what is written comes back the same; limits and faults are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clt_plugins import CrossLayerTranscoder, Faults, Refused
from tests.support.exports import (
    JUMPRELU,
    METHODS,
    MODEL,
    TYINGS,
    D,
    L,
    close,
    export,
    inputs,
    load,
    make,
    said_before_training,
)
from tests.support.helpers import read_tensors

REFERENCE_TYINGS = {
    **TYINGS,
    "untied-skip": {"name": "untied", "skip": True},
    "per_source-affine": {"name": "per_source", "feature_offset": True, "feature_scale": True, "skip": True},
    "per_target-affine": {"name": "per_target", "feature_offset": True, "feature_scale": True},
}


@pytest.mark.parametrize("tying", REFERENCE_TYINGS)
@pytest.mark.parametrize("normalisation", METHODS)
def test_a_reference_checkpoint_comes_back_the_same(tying, normalisation, tmp_path):
    transcoder = make(JUMPRELU, REFERENCE_TYINGS[tying], normalisation)
    folder = export(transcoder, "crosslayer-coding", tmp_path / "out")
    again = load(folder)
    assert again.choices["tying"].name == REFERENCE_TYINGS[tying]["name"]
    assert again.model_described() == MODEL
    close(again(inputs()).detach(), transcoder(inputs()).detach(), 1e-5)
    config = json.loads((folder / "cfg.json").read_text())
    wanted = {"num_features", "num_layers", "d_model", "activation_fn", "normalization_method", "tl_input_template"}
    assert wanted <= config.keys()


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_reference_checkpoint_keeps_its_selection_where_it_is_the_same(name, tmp_path):
    chosen = {"name": name, "k": 5, "ranking": "zscore"}
    again = load(export(make(chosen), "crosslayer-coding", tmp_path / "out")).choices["activation"]
    assert (again.name, again.config.k, again.config.ranking) == (name, 5, "zscore")
    with pytest.raises(ValueError, match=r"would select other features.*convert it first"):
        export(make({"name": name, "k": 5}), "crosslayer-coding", tmp_path / "raw")


def test_merged_ranks_padding_and_repeated_thresholds_are_cut_off(tmp_path):
    transcoder = make()
    folder = export(transcoder, "crosslayer-coding", tmp_path / "out")
    tensors = read_tensors(folder / "model.safetensors")
    for name, value in tensors.items():
        if "encoders" in name:
            tensors[name] = torch.cat([value, torch.full_like(value[:2], 9.0)])
        elif "decoders" in name and "weight" in name:
            tensors[name] = torch.cat([value, torch.full_like(value[:, :2], 9.0)], 1)
        elif "threshold" in name:
            tensors[name] = torch.cat([value, value], 1)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    again = load(folder / "model.safetensors")
    close(again(inputs()).detach(), transcoder(inputs()).detach(), 1e-5)


def test_untied_biases_of_every_pair_are_summed(tmp_path):
    transcoder = make()
    folder = export(transcoder, "crosslayer-coding", tmp_path / "out")
    tensors = read_tensors(folder / "model.safetensors")
    tensors["decoder_module.decoders.0->2.bias_param"] += 0.5
    save_file(tensors, folder / "model.safetensors")
    again = load(folder)
    difference = again.tensors()["b_dec"] - transcoder.tensors()["b_dec"]
    close(difference, torch.tensor([0.0, 0.0, 0.5])[:, None].expand(L, D), 1e-5)


def test_faults_in_a_reference_checkpoint_are_named(tmp_path):
    folder = export(make(tying={"name": "untied", "skip": True}), "crosslayer-coding", tmp_path / "out")
    tensors = read_tensors(folder / "model.safetensors")
    tensors["decoder_module.skip_weights.0->1"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has a skip path from layer 0 to layer 1"):
        load(folder)
    del tensors["encoder_module.encoders.1.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensor 'encoder_module.encoders.1.weight'"):
        load(folder)
    (folder / "norm_stats.json").unlink()
    with pytest.raises(ValueError, match=r"mean_std, but there is no norm_stats.json beside it"):
        load(folder)


def first_bias(transcoder: CrossLayerTranscoder) -> float:
    return float(transcoder.b_enc.detach()[1, 0])


def test_of_numbered_checkpoints_the_last_step_is_read(tmp_path):
    """9000 comes before 10000, as numbers do and texts do not; a latest one comes before both."""
    biases = {"clt_checkpoint_9000": 0.0, "clt_checkpoint_10000": 1.0, "clt_checkpoint_latest": 2.0}
    folder = export(make(), "crosslayer-coding", tmp_path / "out")
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, bias in biases.items():
        tensors["encoder_module.encoders.1.bias_param"].fill_(bias)
        save_file(tensors, folder / f"{name}.safetensors")
        assert first_bias(load(folder)) == bias
    (folder / "clt_checkpoint_latest.safetensors").unlink()
    assert first_bias(load(folder)) == 1.0
    assert first_bias(load(folder / "clt_checkpoint_9000.safetensors")) == 0.0


def test_a_configuration_is_also_read_from_the_folder_above(tmp_path):
    folder = export(make(), "crosslayer-coding", tmp_path / "out")
    expected = load(folder)(inputs())
    (folder / "step").mkdir()
    shutil.move(folder / "model.safetensors", folder / "step/model.safetensors")
    close(load(folder / "step")(inputs()), expected, 1e-6)


def test_statistics_that_are_not_complete_are_refused(tmp_path):
    folder = export(make(), "crosslayer-coding", tmp_path / "out")
    table = json.loads((folder / "norm_stats.json").read_text())
    table["1"]["inputs"]["std"].pop()
    (folder / "norm_stats.json").write_text(json.dumps(table))
    with pytest.raises(Refused, match=r"norm_stats\.json: inputs\.std must be 6 numbers for each of 3 layers"):
        load(folder)
    (folder / "norm_stats.json").write_text("{")
    with pytest.raises(Refused, match=r"norm_stats\.json: not a readable JSON file"):
        load(folder)


LIMITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "thresholds are not needed": ({"activation": {"name": "topk", "k": 5, "ranking": "zscore"}}, []),
    "a skip path": ({"tying": {"name": "per_source", "skip": True}}, []),
    "offsets": ({"tying": {"name": "per_target", "feature_offset": True}}, []),
    "some layers": ({"model": {**MODEL, "layers": [1, 2, 3]}}, []),
    "no name": ({"model": None}, ["model_name: not known from a [model]"]),
    "input": (
        {"model": {**MODEL, "inputs": "odd.{}.place"}},
        ["model.inputs: the TransformerLens name of 'odd.{}.place' is not known: set tl_input_template"],
    ),
    "output": (
        {"model": {**MODEL, "outputs": "odd.{}.place"}},
        ["model.outputs: the TransformerLens name of 'odd.{}.place' is not known"],
    ),
    "another ranking": (
        {"activation": {"name": "batchtopk", "k": 5}},
        [
            'activation: crosslayer-coding selects with ranking = "zscore", scope = "global", and would select other '
            'features than ranking = "raw", scope = "global": convert it first'
        ],
    ),
    "a k of each layer": (
        {"activation": {"name": "batchtopk", "k": [1, 2, 1], "ranking": "zscore"}},
        [
            'activation: crosslayer-coding selects with ranking = "zscore", scope = "global", and would select other '
            'features than ranking = "zscore", scope = "layer": convert it first'
        ],
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_a_checkpoint_cannot_hold_is_said_by_validate_before_training_and_by_the_export(case, tmp_path):
    changes, texts = LIMITS[case]
    faults = said_before_training("crosslayer-coding", tmp_path, **changes)
    assert len(faults) == len(texts)
    assert all(fault.startswith(text) for fault, text in zip(faults, texts, strict=True)), faults


def test_hooks_follow_the_recipe_s_modules_and_the_setting(tmp_path):
    transcoder = make()
    transcoder.described_model = {"path": "gemma", "inputs": "model.layers.{}.pre_feedforward_layernorm.input"}
    config = json.loads((export(transcoder, "crosslayer-coding", tmp_path / "a") / "cfg.json").read_text())
    assert config["tl_input_template"] == "blocks.{}.hook_resid_mid"
    assert config["tl_output_template"] == "blocks.{}.hook_mlp_out"
    for unknown in ("odd.{}.place", "gpt_neox.layers.{}.post_attention_layernorm.input"):
        transcoder.described_model = {"path": "x", "inputs": unknown}
        with pytest.raises(Faults, match="set tl_input_template"):
            export(transcoder, "crosslayer-coding", tmp_path / "b")
    folder = export(transcoder, "crosslayer-coding", tmp_path / "b", tl_input_template="blocks.{}.odd")
    assert json.loads((folder / "cfg.json").read_text())["tl_input_template"] == "blocks.{}.odd"


def test_a_folder_of_the_author_is_not_written(tmp_path):
    transcoder = make()
    transcoder.described_model = {"path": str(Path("/home/author/my-model"))}
    config = (export(transcoder, "crosslayer-coding", tmp_path / "out") / "cfg.json").read_text()
    assert json.loads(config)["model_name"] == "my-model"
    assert "author" not in config
