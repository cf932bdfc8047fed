"""Third-party plugins as they come: broken, clashing, old, misspelt, blocked. The program goes on, and says who."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clt_plugins import Spec
from clt_plugins.errors import PluginError, Refused
from clt_plugins.recipe.read import read_recipe
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry import discovery, sound
from clt_plugins.registry.plugins import load_plugins

if TYPE_CHECKING:
    from tests.conftest import Distributions

LOSS = """
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''A loss.'''
    weight: float = 1.0
    '''Its weight.'''

@hookimpl
def clt_losses():
    return [Spec("{name}", Config, lambda config, context: config, aliases={aliases})]
"""

RECIPE = {
    "name": "x",
    "source": "synthetic",
    "transcoder": {"features": 256},
    "activation": "topk",
    "train": {"steps": 10},
}


def loss(name: str, aliases: tuple[str, ...] = ()) -> str:
    return LOSS.format(name=name, aliases=aliases)


def failures(**options: object) -> dict[str, str]:
    return {each.plugin: str(each) for each in load_plugins(**options).failures}  # type: ignore[arg-type]


def test_a_third_party_plugin_takes_the_same_road_as_the_built_in_ones(distributions: Distributions) -> None:
    distributions.install("clt-extra", "1.2", {"extra": loss("entropy", aliases=("ent",))})
    plugins = load_plugins()
    choice = plugins.choices("losses")["entropy"]
    assert (choice.plugin, choice.distribution) == ("extra", "clt-extra 1.2")
    assert plugins.pick("losses", "ent") == choice
    assert list(plugins.choices("losses")) == sorted(plugins.choices("losses"))
    assert "ent" not in plugins.choices("losses")
    info = next(info for info in plugins.infos if info.name == "extra")
    assert (info.status, info.hooks, Path(info.file).name) == ("active", ("clt_losses",), "clt_extra_extra.py")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("CLT_API = 0", "PluginError: written for plugin API 0, this is 1: install versions that agree"),
        ("x = 1", "PluginError: has no hooks: mark its functions with @clt_plugins.hookimpl"),
        (loss("a").replace("clt_losses", "clt_loses"), "unknown hook 'clt_loses', did you mean 'clt_losses'?"),
        (loss("a").replace("def clt_losses()", "def clt_losses(recipe)"), "PluginValidationError"),
        (
            loss("a").replace("return [", "return 1/0, ["),
            "plugin 'bad', clt_losses: ZeroDivisionError: division",
        ),
        (loss("a").replace("return [", "return ['mse', "), "must return a list of Spec, got 'mse' in it"),
        (loss("a", aliases=("a",)), "offers a name twice: a"),
        (loss("a").replace("weight: float", "name: str"), "call the field otherwise"),
        (loss("a").replace("@frozen(kw_only=True)", "@__import__('attrs').define"), "Config must be frozen"),
        (loss("a").replace("weight: float", "weight: Tensor"), "name 'Tensor' is not defined"),
    ],
)
def test_a_broken_plugin_is_recorded_and_the_others_work(distributions: Distributions, source: str, text: str) -> None:
    distributions.install("clt-bad", "2.3", {"bad": source})
    distributions.install("clt-good", "1.0", {"good": loss("entropy")})
    plugins = load_plugins()
    assert [each.plugin for each in plugins.failures] == ["bad"]
    assert str(plugins.failures[0]).startswith("bad (clt-bad 2.3): ")
    assert text in str(plugins.failures[0])
    assert "\n" not in str(plugins.failures[0])
    assert "entropy" in plugins.choices("losses")
    assert "mse" in plugins.choices("losses")
    assert "a" not in plugins.choices("losses")


def test_a_failed_plugin_matters_when_a_name_is_unknown(distributions: Distributions) -> None:
    distributions.install("clt-bad", "2.3", {"bad": "import not_there"})
    with pytest.raises(ValueError, match=r"unknown name 'entropi'.*; these plugins failed to load: bad$"):
        load_plugins().pick("losses", "entropi")


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"^unknown name 'msee', did you mean 'mse'\? \(known: .*mse.*\)$"):
        load_plugins().pick("losses", "msee")


def test_two_plugins_with_one_choice_are_both_named_and_the_rest_works(distributions: Distributions) -> None:
    distributions.install("clt-one", "1.0", {"one": loss("entropy")})
    distributions.install("clt-two", "2.0", {"two": loss("spread", aliases=("entropy",))})
    plugins = load_plugins()
    both = "'entropy' is offered by plugin 'one' (clt-one 1.0) and plugin 'two' (clt-two 2.0): block one with "
    both += "-p no:one or -p no:two"
    assert both in str(plugins.failures[0])
    with pytest.raises(ValueError, match="offered by") as caught:
        plugins.pick("losses", "entropy")
    assert str(caught.value) == both
    assert {"mse", "spread"} <= plugins.choices("losses").keys()
    assert "entropy" not in plugins.choices("losses")
    assert load_plugins(block=["two"]).pick("losses", "entropy").plugin == "one"
    assert load_plugins(block=["clt-one"]).pick("losses", "entropy").plugin == "two"


def test_an_entry_point_name_of_a_built_in_plugin_does_not_replace_it(distributions: Distributions) -> None:
    distributions.install("aaa-first", "2.3", {"losses": loss("entropy")})
    plugins = load_plugins()
    assert "entry point name 'losses' is already used by clt-plugins" in str(plugins.failures[0])
    assert "-p no:aaa-first" in str(plugins.failures[0])
    assert "mse" in plugins.choices("losses")
    assert not load_plugins(block=["aaa-first"]).failures


def test_a_blocked_plugin_is_not_even_imported(distributions: Distributions, tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    distributions.install("clt-loud", "1.0", {"loud": f"open({str(mark)!r}, 'w').close()\n" + loss("entropy")})
    plugins = load_plugins(block=["loud"])
    assert not mark.exists()
    assert next(info for info in plugins.infos if info.name == "loud").status == "blocked"
    with pytest.raises(ValueError, match=r"unknown name 'entropy'.*blocked: loud"):
        plugins.pick("losses", "entropy")
    load_plugins()
    assert mark.exists()


def test_a_module_that_is_no_installed_plugin_is_loaded_by_its_name(distributions: Distributions) -> None:
    distributions.module("my_experiment", loss("entropy"))
    assert load_plugins(extra=["my_experiment"]).pick("losses", "entropy").plugin == "my_experiment"
    with pytest.raises(Refused, match="-p: there is no module 'not_there_at_all': give one that Python finds"):
        load_plugins(extra=["not_there_at_all"])


def test_without_autoload_only_what_is_named_is_loaded(
    distributions: Distributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.install("clt-extra", "1.2", {"extra": loss("entropy")})
    monkeypatch.setenv("CLT_PLUGINS_DISABLE_AUTOLOAD", "1")
    assert load_plugins().infos == []
    assert [info.name for info in load_plugins(extra=["extra"]).infos] == ["extra"]
    assert "mse" in load_plugins(extra=["clt-plugins"]).choices("losses")


def test_under_strict_any_failure_is_fatal(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    distributions.install("clt-bad", "2.3", {"bad": "import not_there"})
    with pytest.raises(PluginError, match=r"bad \(clt-bad 2.3\)"):
        load_plugins(strict=True)
    load_plugins(strict=True, block=["bad"])
    monkeypatch.setenv("CLT_PLUGINS_STRICT", "1")
    with pytest.raises(PluginError, match=r"bad \(clt-bad 2.3\)"):
        load_plugins()


def test_plugins_come_in_one_order_whatever_the_order_of_the_path(
    tmp_path: Path, distributions: Distributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributions.install("clt-b", "1.0", {"b": loss("bb")})
    distributions.install("clt-a", "1.0", {"a": loss("aa")})
    names = [info.name for info in load_plugins().infos]
    assert names == sorted(names)


def test_each_load_is_fresh(distributions: Distributions) -> None:
    distributions.module("my_experiment", loss("entropy"))
    load_plugins(extra=["my_experiment"])
    assert "entropy" not in load_plugins().choices("losses")


def test_a_command_hook_that_fails_is_recorded_and_the_others_commands_remain(distributions: Distributions) -> None:
    source = "import click\nfrom clt_plugins import hookimpl\n@hookimpl\ndef clt_commands():\n    return "
    distributions.install("clt-bad", "1.0", {"bad": source + "1 / 0"})
    distributions.install("clt-good", "1.0", {"good": source + "[click.Command('hello')]"})
    plugins = load_plugins()
    assert plugins.commands().keys() >= {"hello"}
    assert "plugin 'bad' (clt-bad 1.0), clt_commands: ZeroDivisionError" in str(plugins.failures[0])


def test_a_saved_choice_is_read_back_and_its_faults_named() -> None:
    plugins = load_plugins()
    chosen = structure_choice(plugins, "losses", {"name": "mse", "weight": 2.0})
    assert isinstance(chosen.spec, Spec)
    assert chosen.config.weight == 2.0
    with pytest.raises(ValueError, match=r"^x.json: losses.weight: expected float, got \"2\"$"):
        structure_choice(plugins, "losses", {"name": "mse", "weight": "2"}, "x.json")


def test_a_check_that_breaks_names_its_plugin(distributions: Distributions) -> None:
    broken = "from clt_plugins import hookimpl\n@hookimpl\ndef clt_check():\n    return {}\n"
    for body, text in (
        ("1 / 0", "ZeroDivisionError"),
        ("'a complaint'", "must return a list of str, got 'a complaint'"),
    ):
        distributions.module("check_plugin", broken.format(body))
        with pytest.raises(PluginError, match=f"plugin 'check_plugin' .by -p., clt_check: .*{text}"):
            read_recipe(RECIPE, plugins=load_plugins(extra=["check_plugin"]))
        distributions.forget("check_plugin")


def test_a_checkout_that_is_not_installed_has_its_plugins_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    with caplog.at_level(logging.INFO, "clt_plugins"):
        plugins = load_plugins()
    assert "mse" in plugins.choices("losses")
    assert plugins.pick("losses", "mse").distribution.endswith("(checkout)")
    assert "its plugins are taken from the checkout" in caplog.text
    monkeypatch.setattr(discovery, "ROOT", tmp_path)
    assert load_plugins().infos == []
    assert "no built-in plugins found" in caplog.text


def test_an_engine_and_plugins_from_different_places_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        infos = load_plugins().infos
        assert "mixed installation" not in caplog.text
        monkeypatch.setattr(sound, "ROOT", tmp_path)
        sound.warn_of_mixed_install(infos)
    assert f"mixed installation: the engine is {tmp_path / 'clt_plugins'}" in caplog.text
