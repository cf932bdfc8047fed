"""Each way a plugin can go wrong: one line that names plugin, distribution and version, recipe line, and the remedy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clt_plugins import run
from clt_plugins.errors import ExitCode, Faults, PluginError, parse_path
from clt_plugins.recipe import lines
from clt_plugins.registry.plugins import load_plugins
from tests.support.helpers import tables
from tests.support.third_party import RECIPE

if TYPE_CHECKING:
    from tests.conftest import Distributions

Clt = Callable[..., "subprocess.CompletedProcess[str]"]

LOSS = '''
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """A loss."""
    weight: float = 1.0
    """Its weight."""

class Loss:
    needs_pre = False
    def selection(self, tokens, idle_tokens):
        return None
    def __call__(self, forward):
        return {"mine": forward.features.values.sum() * 0}

def build(config, context):
    return Loss()

@hookimpl
def clt_losses():
    return [Spec("mine", Config, build)]
'''

REMEDY = "update it (pip install -U clt-bad), or leave it out (-p no:bad)"

LOADING = {
    "import error": ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
    "API version": ("CLT_API = 0", "written for plugin API 0, this is 1: install versions that agree"),
    "misspelt hook": (LOSS.replace("def clt_losses", "def clt_loses"), "did you mean 'clt_losses'?"),
    "wrong return": (LOSS.replace("return [Spec", "return ['mse', Spec"), "must return a list of Spec, got 'mse'"),
    "config of any type": (LOSS.replace("weight: float", "weight: object"), "Config.weight: a recipe cannot hold"),
    "untyped config": (LOSS.replace("weight: float", "weight"), "Config.weight: has no type"),
}
STEP = "        return {"
RUNNING = {
    "failure in build": (
        "    return Loss()",
        "    return 1 / 0",
        "failed in build: ZeroDivisionError: division by zero",
    ),
    "wrong object": ("    return Loss()", "    return object()", "build returned object, which is no Loss: it has no"),
    "failure in a step": (
        STEP,
        "        forward.nothing\n" + STEP,
        "failed in a step: AttributeError: 'Forward' object",
    ),
    "bare ValueError": (STEP, "        [].index(3)\n" + STEP, "failed in a step: ValueError: 3 is not in list"),
    "wrong term": ("* 0}", "* 0}.keys()", "a loss must return scalar tensors by name, Loss returned dict_keys"),
}


@pytest.mark.parametrize("way", LOADING)
def test_what_is_wrong_when_a_plugin_loads(way: str, distributions: Distributions) -> None:
    source, text = LOADING[way]
    distributions.install("clt-bad", "2.3", {"bad": source})
    (failure,) = load_plugins().failures
    assert str(failure).startswith("bad (clt-bad 2.3): ")
    assert text in str(failure)
    assert str(failure).endswith(f"; {REMEDY}")
    assert "\n" not in str(failure)


@pytest.mark.parametrize("way", RUNNING)
def test_what_is_wrong_when_it_runs(way: str, distributions: Distributions, tmp_path: Path) -> None:
    old, new, text = RUNNING[way]
    distributions.install("clt-bad", "2.3", {"bad": LOSS.replace(old, new)})
    with pytest.raises(PluginError) as caught:
        run(tables(losses=["mse", "mine"]), out=tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("losses[1]: 'mine' of plugin 'bad' (clt-bad 2.3): ")
    assert text in message
    assert f"; {REMEDY}, or -v shows where" in message
    assert "\n" not in message


def test_on_the_command_line_with_the_recipes_line(clt: Clt, distributions: Distributions, tmp_path: Path) -> None:
    old, new, text = RUNNING["failure in a step"]
    distributions.install("clt-bad", "2.3", {"bad": LOSS.replace(old, new)})
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = clt("run", "recipe.toml")
    assert done.returncode == ExitCode.FAILED
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("recipe.toml:16: losses[1]: 'mine' of plugin 'bad' (clt-bad 2.3): ")
    assert text in last
    assert "(clt_bad_bad.py:16)" in last
    assert "Traceback" not in done.stderr


def test_check_finds_them_all_without_a_run(clt: Clt, distributions: Distributions) -> None:
    ways = {**{way: source for way, (source, _) in LOADING.items()}}
    ways |= {way: LOSS.replace(old, new) for way, (old, new, _) in RUNNING.items()}
    texts = {way: text for way, (_, text) in LOADING.items()} | {way: text for way, (*_, text) in RUNNING.items()}
    for number, source in enumerate(ways.values()):
        named = source.replace('"mine", Config', f'"mine{number}", Config')
        distributions.install(f"clt-bad-{number}", "2.3", {f"bad{number}": named})
    distributions.install("clt-clash", "1.0", {"clash": LOSS.replace('"mine"', '"mse"')})
    distributions.install("clt-good", "1.0", {"good": LOSS})
    distributions.install("clt-slow", "1.0", {"slow": "import torch\n" + LOSS.replace('"mine"', '"slow"')})
    nan = LOSS.replace("values.sum() * 0", "values.sum() / 0").replace('"mine"', '"nan"')
    detached = LOSS.replace("values.sum()", "values.sum().detach()").replace('"mine"', '"detached"')
    distributions.install("clt-mute", "1.0", {"nan": nan, "detached": detached})
    done = clt("plugins", "--check")
    assert done.returncode == ExitCode.FAILED
    faults = [line for line in done.stdout.splitlines() if line.startswith("! ")]
    for number, way in enumerate(ways):
        mine = [line for line in faults if f"clt-bad-{number} 2.3" in line]
        assert len(mine) == 1, (way, faults)
        text = texts[way].removeprefix("failed in a step: ").removeprefix("failed in build: ")
        text = "a term, or several, by name got: dict_keys" if way == "wrong term" else text
        assert text.split(" object")[0] in mine[0], way
    assert any("'mse' is offered by plugin 'clash' (clt-clash 1.0) and plugin 'losses'" in line for line in faults)
    assert not [line for line in faults if "clt-good" in line]
    for text in (
        "plugin 'slow', check 'imports': expected: a module that imports nothing heavy got: ",
        "loss 'nan' of plugin 'nan' (clt-mute 1.0), check 'terms': expected: a finite term",
        "loss 'detached' of plugin 'detached' (clt-mute 1.0), check 'terms': expected: a term that has a gradient",
    ):
        assert [line for line in faults if line.startswith(f"! {text}")], (text, faults)


def test_check_says_what_it_tried(clt: Clt, distributions: Distributions) -> None:
    assert clt("plugins", "--check").stdout.splitlines()[-1] == "tried nothing: no other distribution offers anything"
    needy = LOSS.replace("weight: float = 1.0", "weight: float").replace('"mine"', '"needy"')
    other = LOSS.replace('"mine"', '"other"')
    distributions.install("clt-good", "1.0", {"good": LOSS, "other": other, "needy": needy})
    distributions.install("clt-bad", "2.3", {"bad": LOSS.replace('"mine"', '"bad"').replace("* 0}", "/ 0}")})
    bad, good = "tried 1 choice of clt-bad: 1 fault", "tried 2 choices of clt-good: all well"
    done = clt("plugins", "--check")
    assert done.stdout.splitlines()[-2:] == [bad, f"{good}; not tried, since it needs settings: needy"]
    assert done.returncode == ExitCode.FAILED
    # One plugin, one choice (which is tried, not only listed), one distribution.
    for name, distribution in (("good", "good"), ("mine", "good"), ("bad", "bad")):
        done = clt("plugins", name, "--check")
        (said,) = (line for line in done.stdout.splitlines() if line.startswith("tried "))
        assert said.startswith(f"tried 1 choice of clt-{distribution}: ")
        assert (done.returncode == ExitCode.OK) == said.endswith(": all well") == (name != "bad")
    tried = json.loads(clt("plugins", "clt-bad", "--check", "--json").stdout)["tried"]
    assert [(each["of"], each["choices"], len(each["faults"])) for each in tried] == [("clt-bad", 1, 1)]


def test_check_finds_a_faulty_clt_check(clt: Clt, distributions: Distributions) -> None:
    complaining = "from clt_plugins import hookimpl\n\n@hookimpl\ndef clt_check(recipe):\n    return 'text'\n"
    distributions.install("clt-sane", "1.0", {"complaining": complaining})
    faults = [line for line in clt("plugins", "--check").stdout.splitlines() if line.startswith("! ")]
    (fault,) = faults
    assert fault.startswith("! plugin 'complaining', check 'complaints': expected: `clt_check` to return a list")
    assert "must return a list of str, got 'text'" in fault


def test_what_a_plugin_refuses_is_told_as_it_says(distributions: Distributions, tmp_path: Path) -> None:
    refused = 'raise Refused("losses[1].weight", "too heavy; use a lighter one")'
    source = LOSS.replace("    return Loss()", f"    {refused}").replace("import Spec", "import Refused, Spec")
    distributions.install("clt-fine", "2.3", {"fine": source})
    with pytest.raises(Faults) as caught:
        run(tables(losses=["mse", "mine"]), out=tmp_path / "out")
    assert str(caught.value) == "losses[1].weight: too heavy; use a lighter one"


def test_lines_of_settings() -> None:
    text = 'a = 1\nlosses = ["x"]\n\n[b]\na = 2\n\n[[c]]\nk = 1\n\n[[c]]\nj = 2\nk = 3\n'
    paths = ("a", "losses[0]", "b", "b.a", "c[1]", "c[1].k", "c[0].j", "d")
    found = {path: lines.line_of(text, parse_path(path)) for path in paths}
    assert found == {"a": 1, "losses[0]": 2, "b": 4, "b.a": 5, "c[1]": 10, "c[1].k": 12, "c[0].j": 7, "d": None}
