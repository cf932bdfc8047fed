"""What a format cannot hold is refused, before training where it can be known; and the names that exports write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from clt_exporters.limits import WITHOUT_THRESHOLDS
from clt_plugins import CrossLayerTranscoder, Faults, Thresholded
from clt_plugins.files.folders import read_tensors
from clt_plugins.model.assemble import assemble
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.plugins import load_plugins
from tests.support.exports import (
    MODEL,
    SHARED,
    L,
    circuit_tracer_forward,
    close,
    export,
    exporter,
    inputs,
    make,
    said_before_training,
)
from tests.support.helpers import parts, plugins, recipe, tables

THIRD_PARTY = Path(__file__).parents[3] / "examples/third_party/clt-gated"
FORMATS = ["circuit-tracer", "saelens", "safetensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_offset_shared_by_all_targets_is_folded_and_others_are_refused(name, tmp_path):
    transcoder = make(tying=SHARED)
    with pytest.raises(ValueError, match="feature_offset: differs between target layers"):
        export(transcoder, name, tmp_path / "refused")
    with torch.no_grad():
        transcoder.tying.offset.copy_(transcoder.tying.offset[:1].abs().expand(L, -1))
    folder = export(transcoder, name, tmp_path / "out")
    if name == "circuit-tracer":
        close(circuit_tracer_forward(folder, inputs()), transcoder(inputs()).detach(), 1e-5)
    if name == "safetensors":
        close(CrossLayerTranscoder.load(folder)(inputs()).detach(), transcoder(inputs()).detach(), 1e-5)
    if name == "saelens":  # a folder for each layer, of what its features write to their own layer
        acts, offset = transcoder.encode(inputs()).dense().detach(), transcoder.tying.offset.detach()[0]
        for layer in range(L):
            (file,) = (folder / f"layer_{layer:02}").glob("*.safetensors")
            tensors = read_tensors(file)
            pre = inputs()[:, layer] @ tensors["W_enc"] + tensors["b_enc"]
            rows = transcoder.tying.expand(layer)[:, 0] * transcoder.normaliser.units().scale[layer]
            written = (acts[:, layer] + offset * (acts[:, layer] > 0)) @ rows
            close((pre * (pre > tensors["threshold"])) @ tensors["W_dec"], written, 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_an_activation_without_thresholds_is_refused_with_the_remedy(name, tmp_path):
    with pytest.raises(Faults, match=r"^activation: batchtopk has no thresholds, and .* needs them: convert it first"):
        export(make({"name": "batchtopk", "k": 5}), name, tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_third_party_activation_without_thresholds_nothing_untrue_is_said(name, tmp_path, monkeypatch):
    """It selects nothing by rank. A recipe alone cannot tell what it is; the built activation does."""
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    loaded = load_plugins(extra=["clt_gated"])
    changes = {"activation": {"name": "gated"}, "model": MODEL}
    read_recipe(tables(**changes, exports=[{"name": name}]), plugins=loaded)
    transcoder = assemble(read_recipe(tables(**changes), plugins=loaded)).transcoder
    (fault,) = exporter(name).check(transcoder)
    assert fault.startswith(f"activation: gated has no thresholds, and {name} needs them")
    with pytest.raises(Faults, match="gated has no thresholds"):
        exporter(name).export(transcoder, tmp_path)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_recipe_knows_which_built_in_activations_have_thresholds(name):
    chosen = {"name": name, **({"k": 3} if "topk" in name else {})}
    activation = parts(activation=chosen).transcoder.activation
    assert isinstance(activation, Thresholded) == (name not in WITHOUT_THRESHOLDS)


def test_a_skip_path_is_refused_by_circuit_tracer(tmp_path):
    with pytest.raises(ValueError, match="circuit-tracer folders hold no skip path"):
        export(make(tying={"name": "untied", "skip": True}), "circuit-tracer", tmp_path / "out")


def test_hooks_follow_the_recipe_s_modules(tmp_path):
    transcoder = make()
    described = yaml.safe_load((export(transcoder, "circuit-tracer", tmp_path / "a") / "config.yaml").read_text())
    assert described == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "some/model",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    transcoder.described_model = {
        "path": "gemma",
        "inputs": "model.layers.{}.pre_feedforward_layernorm.input",
        "outputs": "model.layers.{}.post_feedforward_layernorm",
    }
    described = yaml.safe_load((export(transcoder, "circuit-tracer", tmp_path / "b") / "config.yaml").read_text())
    assert (described["feature_input_hook"], described["feature_output_hook"]) == ("hook_resid_mid", "hook_mlp_out")
    transcoder.described_model = {"path": "x", "inputs": "blocks.{}.strange"}
    with pytest.raises(
        ValueError,
        match=r"input_hook: the TransformerLens name for model\.inputs = .*strange",
    ):
        export(transcoder, "circuit-tracer", tmp_path / "c")
    # The blocks of Pythia run attention and MLP in parallel: TransformerLens has no `hook_resid_mid` in them.
    transcoder.described_model = {"path": "x", "inputs": "gpt_neox.layers.{}.post_attention_layernorm.input"}
    with pytest.raises(Faults, match=r"input_hook: the TransformerLens name for .* is not known"):
        export(transcoder, "circuit-tracer", tmp_path / "c")
    transcoder.described_model = {}
    with pytest.raises(ValueError, match="model_name: not known"):
        export(transcoder, "circuit-tracer", tmp_path / "d")
    transcoder.described_model = {"path": "x", "layers": [1, 2, 3]}
    with pytest.raises(ValueError, match="numbers a folder's layers from 0"):
        export(transcoder, "circuit-tracer", tmp_path / "e")


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_of_the_author_is_not_written(name, tmp_path):
    model = tmp_path / "home/author/my-model"
    model.mkdir(parents=True)
    transcoder = make()
    for path in (model, Path("/not/on/this/disk/my-model")):
        transcoder.described_model = {"path": str(path), "tokenizer": str(path)}
        folder = export(transcoder, name, tmp_path / path.parent.name)
        text = "".join(file.read_text() for file in folder.rglob("*") if file.suffix in (".yaml", ".json"))
        assert "my-model" in text
        assert str(path.parent) not in text


def test_a_name_of_the_hub_and_a_setting_are_written_as_they_are(tmp_path):
    transcoder = make()
    transcoder.described_model = {"path": "some/model"}
    config = yaml.safe_load((export(transcoder, "circuit-tracer", tmp_path / "a") / "config.yaml").read_text())
    assert config["model_name"] == "some/model"
    folder = export(transcoder, "circuit-tracer", tmp_path / "b", model_name="a/name")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model_name"] == "a/name"
    metadata = json.loads((export(transcoder, "saelens", tmp_path / "c") / "layer_00/cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "some/model"


LIMITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "thresholds": (
        {"activation": {"name": "topk", "k": 5, "ranking": "zscore"}},
        "circuit-tracer saelens safetensors",
        "activation: topk has no thresholds",
    ),
    "skip": ({"tying": {"name": "per_source", "skip": True}}, "circuit-tracer", "tying.skip: circuit-tracer folders"),
    "offset": (
        {"tying": {"name": "per_target", "feature_offset": True}},
        "circuit-tracer saelens safetensors",
        "tying.feature_offset: training learns an offset for each target layer",
    ),
    "name": ({"model": None}, "circuit-tracer saelens", "model_name: not known"),
    "layers": ({"model": {**MODEL, "layers": [1, 2, 3]}}, "circuit-tracer", "model.layers: circuit-tracer numbers"),
    "input": (
        {"model": {**MODEL, "inputs": "odd.{}.place"}},
        "circuit-tracer saelens",
        "input_hook: the TransformerLens name for model.inputs = 'odd.{}.place'",
    ),
    "output": (
        {"model": {**MODEL, "outputs": "odd.{}.place"}},
        "circuit-tracer saelens",
        "output_hook: the TransformerLens name for model.outputs = 'odd.{}.place'",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", LIMITS)
def test_what_a_format_cannot_hold_is_said_by_validate_before_training_and_by_the_export(case, name, tmp_path):
    """In the same words, by the recipe alone, of the untrained transcoder (without memory, too), and of a trained one;
    and what it can hold is not refused."""
    changes, refusing, text = LIMITS[case]
    faults = said_before_training(name, tmp_path, **changes)
    assert [fault.startswith(text) for fault in faults] == [True] * (name in refusing.split())


def test_all_limits_are_said_at_once_and_a_conversion_counts():
    faulty = tables(tying={"name": "untied", "skip": True}, exports=[{"name": "circuit-tracer"}, {"name": "saelens"}])
    with pytest.raises(Faults) as error:
        read_recipe(faulty, plugins=plugins())
    starts = ["activation:", "tying.skip:", "model_name:"], ["activation:", "model_name:"]
    expected = [f"recipe: stages[{index}].format: {start}" for index, each in enumerate(starts) for start in each]
    texts = [str(fault) for fault in error.value.faults]
    assert [text[: len(start)] for text, start in zip(texts, expected, strict=True)] == expected
    named = [{"name": name, "model_name": "x"} for name in ("circuit-tracer", "saelens", "crosslayer-coding")]
    recipe(convert={}, exports=[*named, {"name": "safetensors"}])
    # One layer has one target: its offset folds.
    one = {"name": "per_target", "feature_offset": True}
    recipe(tying=one, convert={}, exports=named, model={**MODEL, "layers": [0]})
