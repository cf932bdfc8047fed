"""Formats of other tools: a miniature of each is read, computes what its tool computes, and is written on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clt_plugins import Faults
from clt_plugins.cli.main import main_group
from clt_plugins.toml import toml_text
from tests.support.exports import ACTIVATIONS, circuit_tracer_forward, close, export, inputs, load, make
from tests.support.format_truth import D, F, L, Truth
from tests.support.formats import MINIATURES
from tests.support.helpers import read_tensors, tables

ONE_OF_EACH = [
    "circuit-tracer",
    "bytedance",
    "gemma-scope-2",
    "gemma-scope-2, a layer each",
    "transcoder-set, TopK",
    "saelens",
    "clt-forge, two ranks",
    "llamascopium, layertopk",
    "clt-training, per target",
]
WRITTEN = "circuit-tracer", "transcoder-set", "gemma-scope-2", "saelens", "saedashboard", "saebench", "safetensors"
PER_LAYER = {"name": "per_layer"}
SKIP = {"name": "per_layer", "skip": True}


@pytest.fixture
def miniature(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Truth]:
    folder = tmp_path / "miniature"
    folder.mkdir()
    return folder, MINIATURES[request.param](folder)


def command(*arguments: object) -> str:
    """What a command prints, which must not fail."""
    done = CliRunner().invoke(main_group, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("miniature", MINIATURES, indirect=True)
def test_what_is_read_computes_what_its_tool_computes(miniature: tuple[Path, Truth]) -> None:
    folder, truth = miniature
    x = inputs()
    features, outputs = truth.features(x), truth.outputs(x)
    assert 0.05 < (features > 0).float().mean() < 0.9 and outputs.std() > 0.5, "a miniature that does something"
    for lazy in (True, False):
        if not lazy and "offsets" in truth.notes:
            with pytest.raises(Faults, match="adds offsets to active features"):
                load(folder, lazy=False, kernels="torch")
            lazy = None
        loaded = load(folder, lazy=lazy, kernels="torch")
        for dense in (True, False):
            loaded.runs_dense = dense
            with torch.no_grad():
                close(loaded.encode(x).dense(), features, 1e-6)
                close(loaded(x), outputs, 2e-6)
        described = {name: loaded.choices[name].name for name in ("activation", "tying")}
        assert described == {"activation": truth.activation, "tying": truth.tying}
        hooks = loaded.model_described().get("hooks", {})
        assert (hooks.get("input"), hooks.get("output")) == truth.hooks


@pytest.mark.parametrize("miniature", ONE_OF_EACH, indirect=True)
def test_a_public_format_is_inspected_evaluated_and_exported_as_circuit_tracer(
    miniature: tuple[Path, Truth], tmp_path: Path
) -> None:
    folder, truth = miniature
    said = json.loads(command("inspect", folder, "--verify", "--json"))
    assert (said["format"], said["layers"], said["d_model"], said["features"]) == (truth.format, L, D, F)
    assert said["activation"]["name"] == truth.activation and said["tying"]["name"] == truth.tying
    assert (said["thresholds"] is not None) == (truth.activation == "jumprelu") and said["faults"] == []
    assert said["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert "F32" in said["dtypes"]

    convert = {"tolerance": 3.0, "tokens": 64, "calibration_tokens": 64}
    recipe = tables(evaluate={"tokens": 64}, convert=convert, kernels={"name": "torch"})
    (tmp_path / "recipe.toml").write_text(toml_text(recipe))
    judged = json.loads(command("evaluate", folder, "--recipe", tmp_path / "recipe.toml", "--json"))
    assert judged["nmse"] > 0
    if truth.activation == "topk":
        place = tmp_path / "converted"
        command("convert", folder, "--recipe", tmp_path / "recipe.toml", "--out", place)
    else:
        place = folder
    wanted = load(place, kernels="torch")
    x = inputs()
    if truth.skip:
        done = CliRunner().invoke(main_group, ["export", str(place), "--format", "circuit-tracer", "--out", "no"])
        assert done.exit_code == 2 and "export gemma-scope-2, which circuit-tracer reads too" in done.output
        names = "gemma-scope-2"
    else:
        names = "circuit-tracer"
    out = tmp_path / "exported"
    settings = [] if wanted.model_described().get("path") else ["--set", "model_name=some/model"]
    command("export", place, "--format", names, "--out", out, *settings)
    with torch.no_grad():
        close(load(out, kernels="torch")(x), wanted(x), 2e-6)
        if not truth.skip:
            close(circuit_tracer_forward(out, x), wanted(x), 2e-6)
    # What it reads and writes in the language model is kept.
    hooks = load(out, kernels="torch").model_described()["hooks"]
    assert hooks == {"input": truth.hooks[0] or "mlp.hook_in", "output": truth.hooks[1] or "hook_mlp_out"}


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize(
    ("name", "tying"),
    [
        ("transcoder-set", PER_LAYER),
        ("transcoder-set", SKIP),
        ("gemma-scope-2", {"name": "untied", "skip": True}),
        ("gemma-scope-2", {"name": "per_source", "feature_scale": True}),
        ("saelens", PER_LAYER),
        ("saelens", SKIP),
        ("safetensors", {"name": "per_target", "skip": True}),
        ("saedashboard", {"name": "per_source", "feature_scale": True}),
        ("circuit-tracer", PER_LAYER),
    ],
)
def test_what_is_written_comes_back_the_same(name: str, tying: Any, activation: str, tmp_path: Path) -> None:
    transcoder = make(ACTIVATIONS[activation], tying)
    folder = export(transcoder, name, tmp_path / "out")
    again = load(folder, kernels="torch")
    x = inputs()
    with torch.no_grad():
        close(again.encode(x).dense(), transcoder.encode(x).dense(), 2e-6)
        close(again(x), transcoder(x), 2e-6)
    if name in ("transcoder-set", "saelens"):
        assert again.choices["tying"].name == "per_layer"


def test_features_that_write_to_later_layers_are_no_transcoder_set(tmp_path: Path) -> None:
    with pytest.raises(Faults, match=r"tying: its features write to later layers too.*train with the tying per_layer"):
        export(make(), "transcoder-set", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_saebench_s_layers_have_rows_of_norm_1_and_the_same_reconstruction(tmp_path: Path) -> None:
    transcoder = make(tying=PER_LAYER)
    folder = export(transcoder, "saebench", tmp_path / "out")
    x = inputs()
    for i in range(L):
        sae = load_file(folder / f"layer_{i:02}" / "sae.safetensors")
        close(sae["W_dec"].norm(dim=1), torch.ones(F), 1e-6)
        pre = x[:, i] @ sae["W_enc"] + sae["b_enc"]
        acts = pre * (pre > sae["threshold"])
        close(acts @ sae["W_dec"] + sae["b_dec"], transcoder(x)[:, i].detach(), 2e-6)
        said = json.loads((folder / f"layer_{i:02}" / "sae_bench.json").read_text())
        assert (said["hook_layer"], said["hook_name"]) == (i, f"blocks.{i}.ln2.hook_normalized")
    assert "class TranscoderLayer(BaseSAE)" in (folder / "sae_bench_adapter.py").read_text()


def test_every_file_says_what_it_is(tmp_path: Path) -> None:
    transcoder = make(tying=PER_LAYER)
    recipes = set()
    for name in WRITTEN:
        folder = export(transcoder, name, tmp_path / name)
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
            assert said["format"] == {"safetensors": "clt"}.get(name, name) and said["clt_plugins"]
            recipes.add(said["recipe"])
            if name not in ("safetensors", "saedashboard"):
                assert said["layer"] in path.as_posix().rpartition(name)[2]
            if name == "circuit-tracer":
                assert said["side"] == ("encoder" if "enc" in path.name else "decoder")
    assert len(recipes) == 1
    assert len(recipes | {_recipe_of(make(), tmp_path / "other")}) == 2, "another tying, another recipe"


def _recipe_of(transcoder: Any, folder: Path) -> str:
    path = export(transcoder, "safetensors", folder) / "clt.safetensors"
    with safe_open(path, framework="pt") as file:
        return file.metadata()["recipe"]


def test_what_cannot_be_computed_here_is_refused_by_name(tmp_path: Path) -> None:
    def changed(name: str, file: str, **settings: Any) -> Path:
        folder = tmp_path / f"{name}-{'-'.join(settings)}"
        folder.mkdir()
        MINIATURES[name](folder)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return folder

    cases = [
        (changed("llamascopium, topk", "config.json", norm_activation="token-wise"), "norm_activation is 'token-wise'"),
        (changed("llamascopium, topk", "config.json", act_fn="gelu"), "unknown act_fn 'gelu'"),
        (changed("llamascopium, topk", "config.json", sae_type="lorsa"), "a 'lorsa'"),
        (changed("llamascopium, topk", "config.json", top_k=0), "top_k must be a whole number above 0"),
        (changed("clt-training", "h.0.mlp/cfg.json", activation="relu"), "only topk, batchtopk and groupmax"),
        (changed("clt-training, groupmax", "h.0.mlp/cfg.json", k=4), "k = 4 does not divide"),
        (changed("clt-training", "h.1.mlp/cfg.json", k=5), "its sizes and settings"),
        (changed("clt-training", "h.2.mlp/cfg.json", n_targets=2), "n_targets is 2, and there are folders of 1"),
        (changed("clt-training", "h.0.mlp/cfg.json", divide_cross_layer=True), "divide_cross_layer is true"),
        (changed("sparsify", "h.0.mlp/cfg.json", transcode=False), "an autoencoder"),
        (changed("saelens", "sae_a/cfg.json", architecture="topk"), "a 'topk', not one of transcoder"),
        (changed("saelens", "sae_a/cfg.json", normalize_activations="layer_norm"), "only 'none' can be loaded"),
        (changed("bytedance", "config.json", k=0), "k must be a whole number above 0"),
    ]
    for folder, said in cases:
        with pytest.raises(Faults) as refused:
            load(folder)
        assert said in str(refused.value)
    # Norms that are not the rows' would select other features.
    folder = changed("bytedance", "config.json", note="")
    save_file({"W_dec_norm": torch.ones(L, F)}, folder / "W_dec_norm.safetensors")
    with pytest.raises(Faults, match="is not the norm of the decoder's rows"):
        load(folder)
    # A skip path to another layer.
    folder = changed("clt-training", "config.json", note="")
    path = folder / "h.0.mlp" / "sae.safetensors"
    save_file(read_tensors(path) | {"W_skips.1": torch.ones(D, D)}, path)
    with pytest.raises(Faults, match="a skip path from layer 0 to layer 1"):
        load(folder)


def _without_a_file(folder: Path) -> None:
    """Refused; or, where a format does not say how many layers it has, read as what is still there."""
    try:
        fewer = load(folder, lazy=True)
    except Faults:
        return
    assert fewer.n_layers == L - 1


@pytest.mark.parametrize("miniature", MINIATURES, indirect=True)
def test_a_missing_or_misshapen_tensor_is_refused_by_name(miniature: tuple[Path, Truth]) -> None:
    folder, _ = miniature
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.name != "factors.safetensors"]
    assert files or any(folder.rglob("*.pt")), "nothing was tried"
    for path in files:
        whole = read_tensors(path)
        for name, value in whole.items():
            if name in ("feature_count",) or "W_dec_norm_" in name:
                continue
            save_file(whole | {name: torch.zeros(*value.shape, 2)}, path)
            with pytest.raises(Faults, match=re.escape(name)):
                load(folder, lazy=True)
        path.write_bytes(b"no safetensors")
        with pytest.raises(Faults, match=rf"{re.escape(path.name)}|not a transcoder"):
            load(folder)
        save_file(whole, path)
        path.rename(folder / "aside")
        _without_a_file(folder)
        (folder / "aside").rename(path)
    assert load(folder).n_layers == L
