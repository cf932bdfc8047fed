"""Exports: what is written is what a format's own readers compute with, and what is read back is what was written."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt_plugins import CrossLayerTranscoder
from clt_plugins.model.normaliser import estimate
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.helpers import parts, plugins, random_batch, stir

L, D, F = 3, 6, 10
TYINGS = {
    "untied": {"name": "untied"},
    "per_source": {"name": "per_source", "feature_scale": True},
    "per_target": {"name": "per_target", "feature_scale": True},
}
SHARED = {"name": "per_target", "feature_offset": True, "feature_scale": True}
JUMPRELU = {"name": "jumprelu", "threshold": 0.2}
METHODS = ("none", "mean_std", "rms", "sqrt_d_model")
MODEL = {"path": "some/model"}


def make(
    activation: dict[str, Any] = JUMPRELU, tying: dict[str, Any] = TYINGS["untied"], normalisation: str = "mean_std"
) -> CrossLayerTranscoder:
    """A transcoder with every parameter stirred, and statistics of skewed data."""
    transcoder = parts(activation=activation, tying=tying, transcoder={"normalisation": normalisation}).transcoder
    stir(transcoder)
    batch = random_batch(64, L, D, seed=5)
    skewed = type(batch)(batch.inputs * 3 + 1.5, batch.targets * torch.arange(1, D + 1) - 2)
    transcoder.normaliser.fit(normalisation, estimate([skewed], L, D))
    transcoder.described_model = dict(MODEL)
    return transcoder.eval()


def export(transcoder: CrossLayerTranscoder, name: str, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    chosen = structure_choice(plugins(), "exports", {"name": name, **settings})
    build(chosen, transcoder.context).export(transcoder, folder)
    return folder


def inputs(tokens: int = 40) -> torch.Tensor:
    return random_batch(tokens, L, D, seed=8).inputs * 3 + 1.5


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def circuit_tracer_forward(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What circuit-tracer computes with a folder, written from the description of its layout."""
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    out = torch.zeros(len(x), layers, x.shape[2])
    for i in range(layers):
        encoder = {name: value.float() for name, value in load_file(folder / f"W_enc_{i}.safetensors").items()}
        rows = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].float()
        pre = x[:, i] @ encoder[f"W_enc_{i}"].T + encoder[f"b_enc_{i}"]
        threshold = encoder.get(f"threshold_{i}")
        acts = pre.relu() if threshold is None else pre * (pre > threshold)
        out[:, i:] += torch.einsum("bf,ftd->btd", acts, rows)
        out[:, i] += encoder[f"b_dec_{i}"]
    return out


CASES = list(itertools.product(TYINGS, METHODS, ("relu", "jumprelu")))


@pytest.mark.parametrize(("tying", "normalisation", "activation"), CASES)
def test_a_circuit_tracer_folder_computes_the_same_and_comes_back_the_same(tying, normalisation, activation, tmp_path):
    transcoder = make({"relu": {"name": "relu"}, "jumprelu": JUMPRELU}[activation], TYINGS[tying], normalisation)
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    x = inputs()
    wanted = transcoder(x).detach()
    assert wanted.std() > 0.5, "something is reconstructed"
    close(circuit_tracer_forward(folder, x), wanted, 1e-5)
    again = CrossLayerTranscoder.load(folder, plugins=plugins())
    assert again.choices["activation"].name == activation
    close(again(x).detach(), wanted, 1e-5)
    close(again.encode(x).dense().detach(), transcoder.encode(x).dense().detach(), 1e-5)


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_in_bfloat16_it_comes_back_to_a_hundredth(tying, activation, tmp_path):
    transcoder = make({"relu": {"name": "relu"}, "jumprelu": JUMPRELU}[activation], TYINGS[tying])
    folder = export(transcoder, "circuit-tracer", tmp_path / "out", dtype="bfloat16")
    assert load_file(folder / "W_dec_0.safetensors")["W_dec_0"].dtype == torch.bfloat16
    x = inputs()
    with torch.no_grad():
        # Features so near their threshold that rounding decides are another question.
        near = transcoder.encode(x).dense() - CrossLayerTranscoder.load(folder, plugins=plugins()).encode(x).dense()
        sure = near.abs().amax((1, 2)) < 0.1
        found, wanted = CrossLayerTranscoder.load(folder, plugins=plugins())(x), transcoder(x)
    assert sure.float().mean() > 0.7
    assert (found - wanted)[sure].norm() <= 1e-2 * wanted[sure].norm()


@pytest.mark.parametrize("name", ["circuit-tracer", "saelens", "safetensors"])
def test_an_offset_shared_by_all_targets_is_folded_and_others_are_refused(name, tmp_path):
    transcoder = make(tying=SHARED)
    with pytest.raises(ValueError, match="feature_offset: differs between target layers"):
        export(transcoder, name, tmp_path / "refused")
    with torch.no_grad():
        transcoder.tying.offset.copy_(transcoder.tying.offset[:1].abs().expand(L, -1))
    folder = export(transcoder, name, tmp_path / "out")
    if name == "circuit-tracer":
        close(circuit_tracer_forward(folder, inputs()), transcoder(inputs()).detach(), 1e-5)


def test_an_offset_turns_relu_into_thresholds(tmp_path):
    transcoder = make({"name": "relu"}, SHARED)
    with torch.no_grad():
        transcoder.tying.offset.copy_(transcoder.tying.offset[:1].expand(L, -1))
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    close(circuit_tracer_forward(folder, inputs()), transcoder(inputs()).detach(), 1e-5)
    with pytest.raises(ValueError, match=r"threshold_\d\[\d\] is -.* below zero"):
        CrossLayerTranscoder.load(folder, plugins=plugins())


@pytest.mark.parametrize("name", ["circuit-tracer", "saelens", "safetensors"])
def test_a_selection_by_rank_is_refused_with_the_remedy(name, tmp_path):
    with pytest.raises(ValueError, match=r"batchtopk selects features by rank.*convert it first"):
        export(make({"name": "batchtopk", "k": 5}), name, tmp_path / "out")


def test_a_skip_path_is_refused_by_circuit_tracer(tmp_path):
    with pytest.raises(ValueError, match="circuit-tracer folders hold no skip path"):
        export(make(tying={"name": "untied", "skip": True}), "circuit-tracer", tmp_path / "out")


def test_hooks_follow_the_recipe_s_modules(tmp_path):
    import yaml

    transcoder = make()
    about = yaml.safe_load((export(transcoder, "circuit-tracer", tmp_path / "a") / "config.yaml").read_text())
    assert about == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "some/model",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    transcoder.described_model = {
        "path": "gemma",
        "inputs": "model.layers.{}.pre_feedforward_layernorm.input",
        "outputs": "model.layers.{}.post_feedforward_layernorm",
    }
    about = yaml.safe_load((export(transcoder, "circuit-tracer", tmp_path / "b") / "config.yaml").read_text())
    assert (about["feature_input_hook"], about["feature_output_hook"]) == ("hook_resid_mid", "hook_mlp_out")
    transcoder.described_model = {"path": "x", "inputs": "blocks.{}.strange"}
    with pytest.raises(ValueError, match=r"input_hook: TransformerLens's name for .*strange"):
        export(transcoder, "circuit-tracer", tmp_path / "c")
    transcoder.described_model = {}
    with pytest.raises(ValueError, match="model_name: not known"):
        export(transcoder, "circuit-tracer", tmp_path / "d")
    transcoder.described_model = {"path": "x", "layers": [1, 2, 3]}
    with pytest.raises(ValueError, match="numbers a folder's layers from 0"):
        export(transcoder, "circuit-tracer", tmp_path / "e")


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_left_on_disk_it_computes_the_same_and_saves_the_same(activation, dtype, tmp_path):
    transcoder = make({"relu": {"name": "relu"}, "jumprelu": JUMPRELU}[activation])
    folder = export(transcoder, "circuit-tracer", tmp_path / "out", dtype=dtype)
    eager = CrossLayerTranscoder.load(folder, plugins=plugins(), lazy=False)
    lazy = CrossLayerTranscoder.load(folder, plugins=plugins(), lazy=True)
    assert type(eager.tying) is not type(lazy.tying)
    x = inputs()
    for dense in (True, False):
        eager.runs_dense = lazy.runs_dense = dense
        close(lazy(x).detach(), eager(x).detach(), 1e-6)
    close(lazy.tying.norms(), eager.tying.norms(), 1e-6)
    lazy.save(tmp_path / "saved")
    saved = CrossLayerTranscoder.load(tmp_path / "saved", plugins=plugins())
    assert saved.choices["tying"].name == "untied"
    close(saved(x).detach(), eager(x).detach(), 1e-6)
    further = export(lazy, "circuit-tracer", tmp_path / "further")
    close(circuit_tracer_forward(further, x), eager(x).detach(), 1e-5)


def test_a_large_decoder_is_not_read_whole(tmp_path):
    """The most memory a process takes, where it looks at five features of a decoder of 168 MB."""
    features, width, layers = 20_000, 100, 6
    for i in range(layers):
        encoder = {f"W_enc_{i}": torch.zeros(features, width), f"b_enc_{i}": torch.full((features,), -1.0)}
        encoder[f"b_enc_{i}"][:5] = 1.0
        save_file(encoder, tmp_path / f"W_enc_{i}.safetensors")
        rows = torch.zeros(features, layers - i, width)
        rows[:5] = 1.0
        save_file({f"W_dec_{i}": rows}, tmp_path / f"W_dec_{i}.safetensors")
    decoder = sum(path.stat().st_size for path in tmp_path.glob("W_dec_*")) / 2**20
    script = f"""
import pathlib, torch
from clt_plugins import CrossLayerTranscoder
from clt_plugins.registry.build import build

def most():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

transcoder = CrossLayerTranscoder.load({str(tmp_path)!r}, lazy=LAZY)
out = transcoder(torch.zeros(1, {layers}, {width}))
assert torch.equal(out, 5.0 * torch.arange(1, {layers} + 1)[None, :, None].expand(1, {layers}, {width}))
print(most())
"""
    most = {}
    for lazy in (True, False):
        command = [sys.executable, "-c", script.replace("LAZY", str(lazy))]
        most[lazy] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert most[True] < most[False] - 0.6 * decoder, f"MB: {most}, decoder {decoder:.0f}"


def test_a_folder_as_other_trainers_write_it_has_biases_of_zero_and_a_json_file(tmp_path):
    """ByteDance's: no biases, decoder norms beside the weights, and `config.json`."""
    transcoder = make()
    folder = export(transcoder, "circuit-tracer", tmp_path / "out")
    for i in range(L):
        path = folder / f"W_enc_{i}.safetensors"
        save_file({name: value for name, value in load_file(path).items() if not name.startswith("b_")}, path)
        path = folder / f"W_dec_{i}.safetensors"
        rows = load_file(path)
        save_file({**rows, f"W_dec_norm_{i}": rows[f"W_dec_{i}"].norm(dim=-1)}, path)
    (folder / "config.yaml").unlink()
    (folder / "config.json").write_text(json.dumps({"model_name": "some/model"}))
    again = CrossLayerTranscoder.load(folder, plugins=plugins())
    assert again.model_described()["path"] == "some/model"
    assert not again.b_enc.any() and not again.tensors()["b_dec"].any()
    whole = CrossLayerTranscoder.load(export(transcoder, "circuit-tracer", tmp_path / "whole"), plugins=plugins())
    assert torch.equal(again.W_enc, whole.W_enc)
    assert all(torch.equal(again.tying.expand(i), whole.tying.expand(i)) for i in range(L))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable JSON file"):
        CrossLayerTranscoder.load(folder, plugins=plugins())


def test_faults_in_a_circuit_tracer_folder_are_named(tmp_path):
    def faulty(name: str) -> Path:
        return export(make(), "circuit-tracer", tmp_path / name)

    folder = faulty("missing")
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"W_dec_1.safetensors: missing"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    folder = faulty("damaged")
    (folder / "W_enc_2.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"W_enc_2.safetensors: not a readable safetensors file"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    folder = faulty("shape")
    save_file({"W_dec_1": torch.zeros(F, L, D)}, folder / "W_dec_1.safetensors")
    with pytest.raises(ValueError, match=r"'W_dec_1' is \[10, 3, 6\], expected \[10, 2, 6\]"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    folder = faulty("other")
    (folder / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(ValueError, match="a 'transcoder_set', not a cross_layer_transcoder"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    with pytest.raises(ValueError, match="no such folder"):
        CrossLayerTranscoder.load(tmp_path / "nowhere", plugins=plugins())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: not a transcoder: no transcoder.json"):
        CrossLayerTranscoder.load(tmp_path / "empty", plugins=plugins())


def test_saelens_folders_hold_each_layer_s_own_part(tmp_path):
    transcoder = make(tying={"name": "per_source", "skip": True})
    folder = export(transcoder, "saelens", tmp_path / "out")
    x = inputs()
    acts = transcoder.encode(x).dense().detach()
    scale, shift = transcoder.normaliser.target_scale, transcoder.normaliser.target_shift
    affine = transcoder.tying.affine(transcoder.normaliser.inputs(x)).detach()
    for i in range(L):
        about = json.loads((folder / f"layer_{i:02}" / "cfg.json").read_text())
        assert about["architecture"] == "jumprelu_skip_transcoder"
        assert about["metadata"]["hook_name"] == f"blocks.{i}.mlp.hook_in"
        each = load_file(folder / f"layer_{i:02}" / "sae_weights.safetensors")
        pre = x[:, i] @ each["W_enc"] + each["b_enc"]
        found = pre.relu() * (pre > each["threshold"])
        close(found, acts[:, i], 1e-5)
        own = acts[:, i] @ transcoder.tying.expand(i)[:, 0]
        wanted = (own + affine[:, i]) * scale[i] + shift[i]
        close(found @ each["W_dec"] + each["b_dec"] + x[:, i] @ each["W_skip"].T, wanted.detach(), 1e-5)


@pytest.mark.parametrize("tying", [*TYINGS, "skip"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_the_plain_file_computes_the_same(tying, activation, tmp_path):
    chosen = {**TYINGS, "skip": {"name": "untied", "skip": True}}[tying]
    transcoder = make({"relu": {"name": "relu"}, "jumprelu": JUMPRELU}[activation], chosen)
    found = load_file(export(transcoder, "safetensors", tmp_path / "out") / "clt.safetensors")
    x = inputs()
    out = found["b_dec"].expand(len(x), L, D).clone()
    for s in range(L):
        pre = x[:, s] @ found["W_enc"][s].T + found["b_enc"][s]
        acts = pre * (pre > found["threshold"][s]) if "threshold" in found else pre.relu()
        out[:, s:] += torch.einsum("bf,ftd->btd", acts, found[f"W_dec.{s:02}"])
        if "W_skip" in found:
            out[:, s] += x[:, s] @ found["W_skip"][s]
    close(out, transcoder(x).detach(), 1e-5)


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
    again = CrossLayerTranscoder.load(folder, plugins=plugins())
    assert again.choices["tying"].name == REFERENCE_TYINGS[tying]["name"]
    assert again.model_described() == MODEL
    close(again(inputs()).detach(), transcoder(inputs()).detach(), 1e-5)
    about = json.loads((folder / "cfg.json").read_text())
    wanted = {"num_features", "num_layers", "d_model", "activation_fn", "normalization_method", "tl_input_template"}
    assert wanted <= about.keys()


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_reference_checkpoint_keeps_its_selection_where_it_is_the_same(name, tmp_path):
    chosen = {"name": name, "k": 5, "ranking": "zscore"}
    again = CrossLayerTranscoder.load(
        export(make(chosen), "crosslayer-coding", tmp_path / "out"), plugins=plugins()
    ).choices["activation"]
    assert (again.name, again.config.k, again.config.ranking) == (name, 5, "zscore")
    with pytest.raises(ValueError, match=r"would select other features.*convert it first"):
        export(make({"name": name, "k": 5}), "crosslayer-coding", tmp_path / "raw")


def test_merged_ranks_padding_and_repeated_thresholds_are_cut_off(tmp_path):
    transcoder = make()
    folder = export(transcoder, "crosslayer-coding", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "encoders" in name:
            tensors[name] = torch.cat([value, torch.full_like(value[:2], 9.0)])
        elif "decoders" in name and "weight" in name:
            tensors[name] = torch.cat([value, torch.full_like(value[:, :2], 9.0)], 1)
        elif "threshold" in name:
            tensors[name] = torch.cat([value, value], 1)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    again = CrossLayerTranscoder.load(folder / "model.safetensors", plugins=plugins())
    close(again(inputs()).detach(), transcoder(inputs()).detach(), 1e-5)


def test_untied_biases_of_every_pair_are_summed(tmp_path):
    transcoder = make()
    folder = export(transcoder, "crosslayer-coding", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder_module.decoders.0->2.bias_param"] += 0.5
    save_file(tensors, folder / "model.safetensors")
    again = CrossLayerTranscoder.load(folder, plugins=plugins())
    difference = again.tensors()["b_dec"] - transcoder.tensors()["b_dec"]
    close(difference, torch.tensor([0.0, 0.0, 0.5])[:, None].expand(L, D), 1e-5)


def test_faults_in_a_reference_checkpoint_are_named(tmp_path):
    folder = export(make(tying={"name": "untied", "skip": True}), "crosslayer-coding", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder_module.skip_weights.0->1"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="skips from layer 0 to layer 1"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    del tensors["encoder_module.encoders.1.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensor 'encoder_module.encoders.1.weight'"):
        CrossLayerTranscoder.load(folder, plugins=plugins())
    (folder / "norm_stats.json").unlink()
    with pytest.raises(ValueError, match=r"mean_std, but there is no norm_stats.json beside it"):
        CrossLayerTranscoder.load(folder, plugins=plugins())


MODELED = {"path": "some/model"}
LIMITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rank": (
        {"activation": {"name": "topk", "k": 5, "ranking": "zscore"}},
        "circuit-tracer saelens safetensors",
        "activation: topk selects features by rank",
    ),
    "skip": ({"tying": {"name": "per_source", "skip": True}}, "circuit-tracer", "tying.skip: circuit-tracer folders"),
    "offset": (
        {"tying": {"name": "per_target", "feature_offset": True}},
        "circuit-tracer saelens safetensors",
        "tying.feature_offset: is learned for each target layer",
    ),
    "name": ({"model": None}, "circuit-tracer saelens crosslayer-coding", "model_name: not known"),
    "layers": ({"model": {**MODELED, "layers": [1, 2, 3]}}, "circuit-tracer", "model.layers: circuit-tracer numbers"),
    "input": (
        {"model": {**MODELED, "inputs": "odd.{}.place"}},
        "circuit-tracer saelens crosslayer-coding",
        "input_hook: TransformerLens's name for model.inputs = 'odd.{}.place'",
    ),
    "output": (
        {"model": {**MODELED, "outputs": "odd.{}.place"}},
        "circuit-tracer saelens crosslayer-coding",
        "output_hook: TransformerLens's name for model.outputs = 'odd.{}.place'",
    ),
    "ranking": (
        {"activation": {"name": "batchtopk", "k": 5}},
        "crosslayer-coding",
        "activation: crosslayer-coding ranks",
    ),
}


@pytest.mark.parametrize("name", ["circuit-tracer", "saelens", "crosslayer-coding", "safetensors"])
@pytest.mark.parametrize("case", LIMITS)
def test_what_a_format_cannot_hold_is_said_by_validate_before_training_and_by_the_export(case, name, tmp_path):
    """In the same words, by the recipe alone, of the untrained transcoder (without memory, too), and of a trained one;
    and what it can hold is not refused."""
    from clt_plugins.errors import Faults
    from clt_plugins.recipe.read import read_recipe
    from tests.support.helpers import tables

    changes, refusing, text = LIMITS[case]
    chosen = {"model": MODELED, "activation": JUMPRELU, **changes}
    wanted = name in refusing.split()
    if case == "ranking" and not wanted:
        return  # the other formats refuse it as they do "rank"
    said: list[str] = []
    try:
        read_recipe(tables(**chosen, exports=[{"name": name}]), plugins=plugins())
    except Faults as error:
        said = error.faults
    assert [fault.startswith(f"recipe: exports[0]: {text}") for fault in said] == [True] * wanted
    said = [fault.removeprefix("recipe: exports[0]: ") for fault in said]

    from clt_plugins.model.assemble import build

    typed = read_recipe(tables(**chosen), plugins=plugins())
    exporter = build(structure_choice(plugins(), "exports", {"name": name}), parts().context)
    for device in ("cpu", "meta"):
        assert exporter.check(build(typed, plugins(), device=torch.device(device)).transcoder) == said
    transcoder = build(typed, plugins()).transcoder
    stir(transcoder)
    if not wanted:
        exporter.export(transcoder, tmp_path)
    elif case != "offset":
        with pytest.raises(ValueError, match=re.escape(text)) as refused:
            exporter.export(transcoder, tmp_path)
        assert str(refused.value).splitlines() == said
    else:
        with pytest.raises(ValueError, match="feature_offset: differs between target layers"):
            exporter.export(transcoder, tmp_path)
    assert wanted != bool(list(tmp_path.iterdir()))


def test_all_limits_are_said_at_once_and_a_conversion_counts():
    from clt_plugins.errors import Faults
    from clt_plugins.recipe.read import read_recipe
    from tests.support.helpers import tables

    faulty = tables(tying={"name": "untied", "skip": True}, exports=[{"name": "circuit-tracer"}, {"name": "saelens"}])
    with pytest.raises(Faults) as error:
        read_recipe(faulty, plugins=plugins())
    starts = ["activation:", "tying.skip:", "model_name:"], ["activation:", "model_name:"]
    wanted = [f"recipe: exports[{index}]: {start}" for index, each in enumerate(starts) for start in each]
    assert [fault[: len(start)] for fault, start in zip(error.value.faults, wanted, strict=True)] == wanted
    named = [{"name": name, "model_name": "x"} for name in ("circuit-tracer", "saelens", "crosslayer-coding")]
    read_recipe(tables(convert={}, exports=[*named, {"name": "safetensors"}]), plugins=plugins())
    # One layer has one target: its offset folds.
    one = {"name": "per_target", "feature_offset": True}
    read_recipe(tables(tying=one, convert={}, exports=named, model={**MODELED, "layers": [0]}), plugins=plugins())
