"""Recipes: the nine kinds of fault, `requires`, paths, and that a resolved recipe is the recipe."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt_plugins import toml
from clt_plugins.contract.recipe import Recipe
from clt_plugins.recipe.read import as_toml, read_recipe, recipe_data
from clt_plugins.registry.plugins import Plugins
from tests.support.recipes import GOOD, faults, merged

if TYPE_CHECKING:
    from tests.conftest import Distributions

NINE = """
name = "x"
source = "synthetic"
[transcoder]
features = 64
[activation]
name = "some"
k = "abc"
warmpu = 3
dtype = "bf16"
[[losses]]
name = "msee"
[[losses]]
name = "layered"
layers = [0, "x"]
[train]
log_every = true
lr = -3
"""


def test_the_kinds_of_fault_give_one_line_each_all_at_once(
    stubbed: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(NINE)
    known = ", ".join(stubbed.choices("losses"))
    assert faults("recipe.toml", stubbed) == [
        'recipe.toml:8: activation.k: expected int, got "abc"',
        "recipe.toml:9: activation.warmpu: unknown key, did you mean 'warmup'?",
        'recipe.toml:10: activation.dtype: expected one of "float32", "bfloat16", got "bf16", did you mean "bfloat16"?',
        f"recipe.toml:11: losses[0]: unknown name 'msee', did you mean 'mse'? (known: {known})",
        'recipe.toml:15: losses[1].layers[1]: expected int, got "x"',
        "recipe.toml:17: train.log_every: expected int, got true",
        "recipe.toml:16: train.steps: required, but missing",
        "recipe.toml:18: train.lr: must be > 0: -3.0",
    ]


def test_a_syntax_fault_has_its_line_and_column(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text("[activation\n")
    line = "recipe.toml: Expected ']' at the end of a table declaration (at line 1, column 12)"
    assert faults("recipe.toml", plugins) == [line]


@pytest.mark.parametrize("line", ["path = Dense", "flag = True"])
def test_what_is_no_value_has_the_remedy(plugins: Plugins, tmp_path: Path, line: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"[transcoder]\n{line}\n")
    (found,) = faults(file, plugins)
    assert re.fullmatch(
        rf"{file}: Invalid value \(at line 2, column 8\): text stands in quotes, true and false in small letters", found
    )


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"steps": 600}, "steps: unknown key: it is a setting of [train]"),
        ({"features": 64}, "features: unknown key: it is a setting of [transcoder] and [source]"),
        (
            {"transcoder": {"features": 8, "name": "mine"}},
            "transcoder.name: unknown key (known: device, dtype, features, freeze, from, path, statistics)",
        ),
        ({"train": {"steps": 1, "seed": 3}}, "train.seed: unknown key: it belongs above the first [table]"),
        (
            {"train": {"steps": 1, "stages": ["evaluate"]}},
            "train.stages: unknown key: it belongs above the first [table], or in a table of its own, [[stages]]",
        ),
        ({"optimizer": {"name": "adam", "lr": 1}}, "optimizer.lr: unknown key: it is a setting of [train]"),
        (
            {"transcoder": {"features": 8, "layers": 2}},
            "transcoder.layers: unknown key: it is a setting of [model] and [source]",
        ),
        (
            {"transcoder": {"features": 8, "activation": "topk"}},
            "transcoder.activation: unknown key: it belongs above the first [table], or in a table of its own, "
            "[activation]",
        ),
        (
            {"transcoder": {"features": 8, "k": 2}},
            "transcoder.k: unknown key: it is a setting of [activation] and [[losses]]",
        ),
        (
            {"transcoder": {"features": 8, "train": {}}},
            "transcoder.train: unknown key: it is a table of its own, [train]",
        ),
        ({"losses": {"name": "mse"}}, "losses: a recipe may have several: write [[losses]], with two brackets"),
        ({"stages": {"name": "evaluate"}}, "stages: a recipe may have several: write [[stages]], with two brackets"),
        ({"activation": [{"name": "some"}]}, "activation: a recipe has one: write [activation], with one bracket"),
    ],
)
def test_what_stands_in_the_wrong_place_is_told_its_own(stubbed: Plugins, table: dict[str, Any], line: str) -> None:
    assert faults(merged(**table), stubbed) == [f"recipe: {line}"]


def test_a_flag_in_the_wrong_place_is_told_its_own(stubbed: Plugins) -> None:
    line = "--set optimizer.lr=1: unknown key: it is a setting of [train]"
    assert faults(GOOD, stubbed, "optimizer.lr=1") == [line]


def test_a_byte_order_mark_before_the_recipe_changes_nothing(tmp_path: Path, plugins: Plugins) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbf" + toml.toml_text(GOOD | {"activation": {"name": "topk", "k": 4}}).encode())
    assert read_recipe(file, plugins=plugins).name == "x"
    file.write_bytes(b"\xef\xbb\xbfseed = -1\n" + file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    assert f"{file}:1: seed: must be >= 0: -1" in faults(str(file), plugins), "lines are found all the same"


def test_a_file_that_cannot_be_read_is_a_fault(plugins: Plugins, tmp_path: Path) -> None:
    latin, folder, absent = tmp_path / "latin.toml", tmp_path, tmp_path / "absent.toml"
    latin.write_bytes(b'name = "caf\xe9"')
    assert faults(latin, plugins) == [f"{latin}: not UTF-8 text: invalid continuation byte at byte 11"]
    assert faults(absent, plugins) == [f"{absent}: no such file"]
    assert faults(folder, plugins) == [f"{folder}: not a file"]


def test_an_unknown_table_and_a_bad_name_are_faults(stubbed: Plugins) -> None:
    assert faults(merged(trian={}), stubbed) == ["recipe: trian: unknown key, did you mean 'train'?"]
    for name in ("../up", "a/b", "", ".hidden"):
        assert faults(merged(name=name), stubbed) == [
            f"recipe: name: must be letters, digits, '-', '_' and '.', to name a folder: {name!r}"
        ]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"optimizer": {"name": "adam", "betas": [0.9]}}, "optimizer.betas: length must be >= 2: 1"),
        ({"optimizer": {"name": "adam", "betas": [0.9, 1.0]}}, "optimizer.betas: must be < 1: 1.0"),
        ({"schedule": {"name": "wsd", "warmup_steps": 10}}, "schedule.warmup_steps: must be < steps (10): 10"),
        ({"train": {"steps": 10, "lr": math.inf}}, "train.lr: must be finite: inf"),
        (
            {"model": {"path": "m", "inputs": "h.0.mlp"}},
            "model.inputs: must hold one {} where the layer's number goes: 'h.0.mlp'",
        ),
        (
            {"model": {"path": "m", "layers": [2, 1]}},
            "model.layers: must be at least one number >= 0, ascending: [2, 1]",
        ),
        ({"seed": -1}, "seed: must be >= 0: -1"),
    ],
)
def test_settings_out_of_range_are_faults(stubbed: Plugins, table: dict[str, Any], line: str) -> None:
    assert faults(merged(**table), stubbed) == [f"recipe: {line}"]


def test_what_a_recipe_does_not_say_has_its_default(stubbed: Plugins) -> None:
    recipe = read_recipe(GOOD, plugins=stubbed)
    assert recipe.tying.name == "untied"
    assert [loss.name for loss in recipe.losses] == ["mse", "auxk"]
    assert [sink.name for sink in recipe.loggers] == ["tensorboard", "jsonl", "console"]
    assert recipe.parallel.name == "single"
    assert recipe.kernels.name == "auto"
    assert recipe.stages == []
    assert recipe.model is None
    assert (recipe.optimizer.name, recipe.schedule.name) == ("adam", "linear")
    assert recipe.optimizer.config.betas == [0.9, 0.95]


# -- requires, checks, paths --------------------------------------------------------------------------------------


def test_required_distributions_must_be_there_in_that_version(stubbed: Plugins, distributions: Distributions) -> None:
    distributions.install("clt-gated", "0.9", {})
    assert read_recipe(merged(requires=["clt-gated>=0.5,<1"]), plugins=stubbed).requires == ["clt-gated>=0.5,<1"]
    assert faults(merged(requires=["clt-gated>=1.0", "clt-none", "?!", 3]), stubbed) == [
        "recipe: requires[3]: expected str, got 3",
        "recipe: requires[0]: clt-gated>=1.0 is needed, but clt-gated 0.9 is installed",
        "recipe: requires[1]: clt-none is not installed: pip install 'clt-none'",
        'recipe: requires[2]: expected a requirement such as "clt-gated>=1.0", got "?!"',
    ]


def test_plugins_complaints_come_when_the_recipe_is_typed(stubbed: Plugins) -> None:
    big = merged(activation={"name": "some", "k": 65})
    assert faults(big, stubbed) == ["recipe: activation.k: must be <= transcoder.features (64)"]


def test_paths_are_looked_for_beside_the_recipe(
    stubbed: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    (folder / "models" / "small").mkdir(parents=True)
    file = folder / "recipe.toml"
    losses = [{"name": "layered", "model": "models/small"}]
    file.write_text(toml.toml_text(merged(model={"path": "models/small", "tokenizer": "org/tokens"}, losses=losses)))
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("recipes/recipe.toml", plugins=stubbed)
    assert recipe.model is not None
    assert recipe.model.path == recipe.losses[0].config.model == str(folder / "models" / "small")
    assert recipe.model.tokenizer == "org/tokens"


# -- the resolved recipe -------------------------------------------------------------------------------------------


def test_the_resolved_recipe_is_the_recipe(stubbed: Plugins, tmp_path: Path) -> None:
    table = merged(
        model={"path": "org/name", "layers": [0, 2]},
        losses=["mse", {"name": "layered", "layers": [1]}],
        train={"steps": 10},
        optimizer={"name": "adam", "eps": 1e-16},
        kernels="auto",
    )
    recipe = read_recipe(table, plugins=stubbed)
    file = tmp_path / "resolved.toml"
    file.write_text(as_toml(recipe))
    assert read_recipe(file, plugins=stubbed) == recipe
    assert read_recipe(recipe_data(recipe), plugins=stubbed) == recipe
    data = tomllib.loads(as_toml(recipe))
    assert data == recipe_data(recipe)
    assert data["optimizer"]["eps"] == 1e-16
    assert "clip_norm" not in data["train"]


def test_none_in_a_dictionary_means_not_given(stubbed: Plugins) -> None:
    assert read_recipe(merged(model=None, tying=None, seed=None), plugins=stubbed) == read_recipe(GOOD, plugins=stubbed)


def test_a_recipe_is_not_changed_by_reading_it(stubbed: Plugins) -> None:
    table = merged(losses=[{"name": "mse"}])
    before = repr(table)
    assert isinstance(read_recipe(table, ["losses.0.weight=3"], stubbed), Recipe)
    assert repr(table) == before


scalars = st.text(st.characters(exclude_categories=["Cs"])) | st.booleans() | st.integers(-(2**63), 2**63 - 1)
values = st.recursive(
    scalars | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), values, max_size=5))
def test_what_is_written_as_toml_is_read_back(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.toml_text(table)) == table
