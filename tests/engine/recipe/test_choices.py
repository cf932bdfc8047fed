"""Choices in the settings of choices: read, listed, written, compared, built; each fault by its path."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
import torch
from attrs import field, frozen

from clt_plugins import Selected, build, default_choice, read_recipe, recipe_data, run, toml_text
from clt_plugins.cli.listing import as_text, listing
from clt_plugins.contract.types import check_config
from clt_plugins.errors import Faults, PluginError
from clt_plugins.model.assemble import make_context
from clt_plugins.recipe import moved
from clt_plugins.recipe.changes import changes
from clt_plugins.recipe.lines import line_of
from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.support.guide import files, guide
from tests.support.helpers import tables

AROUND = '''
from typing import Annotated

from attrs import field, frozen
from clt_plugins import Refused, Selected, Spec, build, default_choice, hookimpl


@frozen(kw_only=True)
class AroundConfig:
    """Another source, and some more."""

    source: Annotated[Selected, "source"] = default_choice({"name": "synthetic", "layers": 2})
    """The source around which this is."""
    others: list[Annotated[Selected, "source"]] = field(factory=list)
    """More of them."""
    named: dict[str, Annotated[Selected, "source"]] = field(factory=dict)
    """And some by name."""
    spare: Annotated[Selected, "source"] | None = None
    """Perhaps one more."""


@frozen(kw_only=True)
class FaultyConfig:
    """Fails, or refuses a setting."""

    size: int = 1
    """Refused if it is 2."""


def build_around(config, context):
    for other in config.others:
        build(other, context)
    return build(config.source, context)


def build_faulty(config, context):
    if config.size == 2:
        raise Refused("source.size", "must not be 2")
    raise RuntimeError("oops")


@hookimpl
def clt_sources():
    return [Spec("around", AroundConfig, build_around), Spec("faulty", FaultyConfig, build_faulty)]
'''

TWO_DEEP = {"name": "around", "source": {"name": "around", "others": [{"name": "faulty", "size": 2}]}}


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    (tmp_path / "my_around.py").write_text(AROUND)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield load_plugins(extra=["my_around"])
    sys.modules.pop("my_around", None)


def test_defaults_are_by_name_and_a_recipe_comes_back_from_its_toml(around: Plugins) -> None:
    spare = {"name": "around", "others": ["synthetic", {"name": "faulty", "size": 3}], "named": {"a b": "synthetic"}}
    recipe = read_recipe(tables(source={"name": "around", "spare": spare}), plugins=around)
    assert recipe.source.config.source.name == "synthetic"
    assert recipe.source.config.source.config.layers == 2
    assert recipe.source.config.spare.config.others[1].config.size == 3
    text = toml_text(recipe_data(recipe))
    again = read_recipe(tomllib.loads(text), plugins=around)
    assert toml_text(recipe_data(again)) == text
    assert again.source.config == recipe.source.config


def test_every_choice_has_its_path(around: Plugins) -> None:
    source = {"name": "around", "others": ["synthetic", "around"], "named": {"x": "synthetic"}}
    recipe = read_recipe(tables(source=source), plugins=around)
    paths = [path for path, _ in recipe.selected() if path.startswith("source")]
    assert paths == [
        "source",
        "source.source",
        "source.others[0]",
        "source.others[1]",
        "source.others[1].source",
        "source.named.x",
    ]


@pytest.mark.parametrize(
    ("inner", "fault"),
    [
        ({"source": "synthetci"}, "source.source: unknown name 'synthetci', did you mean 'synthetic'?"),
        ({"source": {"layers": 3}}, "source.source.name: required, but missing"),
        ({"source": 3}, "source.source: expected a table with a name, got 3"),
        ({"spare": {"name": "synthetic", "layers": 0}}, "source.spare.layers: must be > 0: 0"),
        ({"others": ["around", {"name": "around", "source": {"name": "faulty", "seize": 1}}]},
         "source.others[1].source.seize: unknown key, did you mean 'size'?"),
        ({"others": "synthetic"}, 'source.others: expected list of a choice for [source], got "synthetic"'),
        ({"named": {"x": 1}}, "source.named.x: expected a table with a name, got 1"),
    ],
)  # fmt: skip
def test_a_fault_in_a_choice_in_a_choice_is_named_by_its_path(around: Plugins, inner: dict, fault: str) -> None:
    with pytest.raises(Faults) as caught:
        read_recipe(tables(source={"name": "around", **inner}), plugins=around)
    assert [str(one).removeprefix("recipe: ").split(" (known")[0] for one in caught.value.faults] == [fault]


def test_what_is_refused_or_fails_in_build_is_named_by_its_path(around: Plugins) -> None:
    recipe = read_recipe(tables(source=TWO_DEEP), plugins=around)
    with pytest.raises(Faults, match=r"^source\.source\.others\[0\]\.size: must not be 2$"):
        build(recipe.source, make_context(recipe))
    recipe = read_recipe(tables(source={"name": "around", "source": "faulty"}), plugins=around)
    with pytest.raises(PluginError, match=r"^source\.source: 'faulty' of plugin 'my_around' .*RuntimeError: oops"):
        build(recipe.source, make_context(recipe))


def test_the_choice_inside_is_built(around: Plugins) -> None:
    recipe = read_recipe(tables(source={"name": "around"}), plugins=around)
    built = build(recipe.source, make_context(recipe))
    assert built.n_layers == 2
    assert isinstance(built.next().inputs, torch.Tensor)


def test_the_listing_says_which_table_and_the_default(around: Plugins) -> None:
    text = as_text(listing(around, "around"))
    assert 'source: choice for [source] = {name = "synthetic", layers = 2}' in text
    assert "others: list[choice for [source]] = []" in text
    assert "spare: choice for [source], optional" in text


def test_a_resumed_run_compares_choices_in_choices(around: Plugins) -> None:
    def found(before: dict, now: dict) -> list[tuple[str, object, object]]:
        plain = recipe_data(read_recipe(tables(source=before), plugins=around))
        return [(c.setting, c.before, c.now) for c in changes(plain, read_recipe(tables(source=now), plugins=around))]

    before = {"name": "around", "others": ["around", {"name": "faulty", "size": 3}]}
    assert found(before, before) == []
    other = {"name": "around", "others": ["around", {"name": "faulty", "size": 4}]}
    assert found(before, other) == [("source.others[1].size", 3, 4)]
    other = {"name": "around", "others": ["around", "synthetic"]}
    assert found(before, other) == [("source.others[1].name", "faulty", "synthetic")]
    changed = {**before, "source": {"name": "synthetic", "layers": 3}}
    assert found(before, changed) == [("source.source.layers", 2, 3)]


def test_a_choice_that_an_older_plugin_did_not_have_counts_only_if_it_is_not_the_default(around: Plugins) -> None:
    recipe = read_recipe(tables(source={"name": "around"}), plugins=around)
    before = recipe_data(recipe)
    del before["source"]["source"]
    assert changes(before, recipe) == []
    other = read_recipe(tables(source={"name": "around", "source": "synthetic"}), plugins=around)
    assert [change.setting for change in changes(before, other)] == ["source.source"]


@frozen(kw_only=True)
class Misspelt:
    """A table that there is not."""

    source: list[Annotated[Selected, "sorce"]] = field(factory=list)


@frozen(kw_only=True)
class Bare:
    """No table."""

    source: Selected = default_choice("synthetic")


def test_a_config_with_a_choice_for_no_table_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Misspelt\.source: no choices are made in a table 'sorce', did you mean"):
        check_config(Misspelt)
    with pytest.raises(TypeError, match=r'Bare\.source: a recipe cannot hold .*Annotated\[Selected, "table"\]'):
        check_config(Bare)


def test_the_line_of_a_setting_in_a_table_in_a_table() -> None:
    text = """\
[[losses]]
name = "mse"
[[losses]]
name = "x"
inline = { name = "linear", end = 3 }
[losses.schedule]   # its own
name = "cosine"
end = 4
[[losses.parts]]
name = "a"
[[losses.parts]]
name = "b"
[source]
name = "around"
[source.source]
path = "p"
"""
    found = {
        ("losses", 1, "inline", "end"): 5,
        ("losses", 1, "schedule", "end"): 8,
        ("losses", 1, "schedule", "warmup_steps"): 6,
        ("losses", 1, "parts", 1, "name"): 12,
        ("losses", 0, "schedule", "end"): 1,
        ("source", "source", "path"): 16,
        ("source", "source", "source", "path"): 15,
        ("loggers", 0): None,
    }
    assert {where: line_of(text, where) for where in found} == found


def test_a_setting_that_has_moved_is_refused_with_the_line_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {
        "train.k": lambda value: {"activation": {"k": value}},
        "train.ranking": lambda value: {"activation": {"ranking": value}},
        "log": lambda value: {"loggers": [{"name": "tensorboard", **value}]},
    }
    monkeypatch.setattr(moved, "MOVED", now)
    chosen = tables(activation="topk", loggers=[])
    chosen["train"] |= {"k": 5, "ranking": "raw"}
    chosen["log"] = {"flush_seconds": 2.0}
    with pytest.raises(Faults) as caught:
        read_recipe(chosen)
    complete = '`activation = {name = "topk", k = 5, ranking = "raw"}`'
    assert [str(fault) for fault in caught.value.faults] == [
        f"recipe: train.k: has moved to [activation]: write {complete} above the first [table]",
        f"recipe: train.ranking: has moved to [activation]: write {complete} above the first [table]",
        'recipe: log: has moved to [[loggers]]: write `loggers = [{name = "tensorboard", flush_seconds = 2.0}]` '
        "above the first [table]",
    ]


def test_the_guides_source_around_sources_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = files(guide())["clt_turns/__init__.py"]
    (tmp_path / "clt_turns.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(extra=["clt_turns"])
    of = [{"name": "synthetic", "active": active} for active in (2.0, 6.0, 3.0)]
    settings = tables(source={"name": "turns", "of": of}, loggers=[])
    at_once = run(settings, out=tmp_path / "at_once", plugins=plugins)
    settings["train"]["checkpoint_every"] = 5
    run(settings, out=tmp_path / "parts", plugins=plugins)
    for path in (tmp_path / "parts" / "checkpoints").glob("step_*"):
        if path.name != "step_000005":
            shutil.rmtree(path)
    parts = run(settings, out=tmp_path / "parts", resume="latest", plugins=plugins)
    assert torch.equal(at_once.W_enc, parts.W_enc)
    of[1]["layers"] = 3
    with pytest.raises(Faults, match=r"source\.of\[1\]: it has other layers"):
        run(settings, out=tmp_path / "other", plugins=plugins)
    sys.modules.pop("clt_turns")
