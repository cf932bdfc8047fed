"""The commands as a user meets them: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from clt_plugins.cli.main import main_group
from clt_plugins.contract.recipe import Recipe
from clt_plugins.errors import ExitCode, PluginError, Refused, Stopped
from clt_plugins.registry.plugins import load_plugins

if TYPE_CHECKING:
    from tests.conftest import Distributions

Clt = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """
name = "x"
source = "synthetic"
activation = "topk"
[transcoder]
features = 64
[train]
steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main_group, arguments, prog_name="clt-plugins")


def replace_run(monkeypatch: pytest.MonkeyPatch, function: Callable[..., None]) -> None:
    monkeypatch.setattr(import_module("clt_plugins.training.run"), "run", function)


def test_validate_prints_the_resolved_recipe_and_nothing_else(clt: Clt, recipe: Path) -> None:
    done = clt("validate", "recipe.toml", "--set", "train.lr=3e-4")
    assert done.returncode == ExitCode.OK
    assert tomllib.loads(done.stdout)["train"]["lr"] == 3e-4


def test_faults_go_to_stderr_a_line_each_without_a_stack_trace(clt: Clt, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("64", '"64"').replace("topk", "topj"))
    done = clt("run", "recipe.toml", "--set", "train.steps=abc")
    known = ", ".join(load_plugins().choices("activation"))
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "not installed" not in line] == [
        f"recipe.toml:4: activation: unknown name 'topj', did you mean 'topk'? (known: {known})",
        'recipe.toml:6: transcoder.features: expected int, got "64"',
        '--set train.steps=abc: expected int, got "abc"',
    ]


def test_wrong_usage_is_2_with_a_suggestion(recipe: Path) -> None:
    for arguments, text in [
        (("runn", "recipe.toml"), "Did you mean 'run'?"),
        (("run", "recipe.toml", "--sett", "a=1"), "Did you mean"),
        (("run",), "Missing argument 'RECIPE'"),
        (("validate", "absent.toml"), "absent.toml: no such file"),
        (("plugins", "clt-plugin"), "no plugin, table or choice is called 'clt-plugin'"),
    ]:
        done = invoke(*arguments)
        assert done.exit_code == ExitCode.USAGE
        assert text in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("command", [["--help"], ["plugins"], ["validate", "recipe.toml"], ["init"]])
def test_what_only_reads_starts_without_torch(recipe: Path, command: list[str]) -> None:
    probe = (
        "import sys\n"
        "from clt_plugins.cli.main import main_group\n"
        "code = main_group(sys.argv[1:], standalone_mode=False)\n"
        "assert not code, code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'numba', 'h5py', 'tensorboard'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", probe, *command], check=True, stdout=subprocess.DEVNULL, timeout=120)


def test_plugins_lists_choices_with_their_settings_and_docs() -> None:
    done = invoke("plugins", "topk")
    assert done.exit_code == ExitCode.OK
    assert '      scope: "global" | "layer" = "global"  Whether k counts over all layers' in done.stdout
    found = json.loads(invoke("plugins", "--json").stdout)
    assert {info["name"] for info in found["plugins"]} >= {"activations", "tyings", "losses", "parallel"}
    assert all(info["status"] == "active" and Path(info["file"]).is_file() for info in found["plugins"])
    k = next(choice for choice in found["choices"]["activation"] if choice["name"] == "batchtopk")["fields"][0]
    assert (k["name"], k["type"], k["default"], k["required"]) == ("k", "int | float | list[int | float]", 100, False)
    assert k["doc"].startswith("Features kept per token")
    steps = found["tables"]["train"]["fields"][0]
    assert (steps["name"], steps["required"]) == ("steps", True)


def test_every_built_in_choice_is_documented() -> None:
    done = invoke("plugins", "--check")
    assert "has no doc" not in done.stdout
    assert done.exit_code == ExitCode.OK


def test_a_broken_plugin_is_listed_and_nothing_else_fails(clt: Clt, distributions: Distributions, recipe: Path) -> None:
    distributions.install("clt-bad", "2.3", {"bad": "import not_there"})
    line = "bad (clt-bad 2.3): ModuleNotFoundError: No module named 'not_there'"
    done = clt("plugins")
    assert done.returncode == ExitCode.FAILED
    assert f"! {line}" in done.stdout
    assert clt("plugins", "-p", "no:bad").returncode == ExitCode.OK
    done = clt("--help")
    assert done.returncode == ExitCode.OK
    assert "validate" in done.stdout
    assert clt("--help", CLT_PLUGINS_STRICT="1").returncode == ExitCode.OK
    done = clt("validate", "recipe.toml")
    assert done.returncode == ExitCode.OK
    assert f"warning: plugin failed: {line}" in done.stderr
    done = clt("validate", "recipe.toml", "--strict")
    assert done.returncode == ExitCode.FAILED
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_clash_stops_only_the_recipe_that_needs_the_name(distributions: Distributions, recipe: Path) -> None:
    source = "from attrs import frozen\nfrom clt_plugins import Spec, hookimpl\n@frozen(kw_only=True)\nclass C:\n"
    source += "    '''Doc.'''\n@hookimpl\ndef clt_activations():\n    return [Spec('topk', C, print)]\n"
    distributions.install("clt-clash", "2.3", {"clash": source})
    done = invoke("validate", "recipe.toml")
    assert done.exit_code == ExitCode.USAGE
    assert done.stderr.splitlines()[-1].startswith(
        "recipe.toml:4: activation: 'topk' is offered by plugin 'activations' (clt-plugins 0.1.0"
    )
    assert "and plugin 'clash' (clt-clash 2.3): block one with -p no:activations or -p no:clash" in done.stderr
    assert invoke("validate", "recipe.toml", "--set", "activation=relu").exit_code == ExitCode.OK
    assert invoke("validate", "recipe.toml", "-p", "no:clash").exit_code == ExitCode.OK


def test_plugins_add_commands(distributions: Distributions, recipe: Path) -> None:
    source = (
        "import click\nfrom clt_plugins import hookimpl, with_recipe\n"
        "@click.command('greet')\n@with_recipe\ndef greet(recipe, plugins):\n    '''Says hello.'''\n"
        "    click.echo(f'hello {recipe.name}')\n"
        "@hookimpl\ndef clt_commands():\n    return [greet]\n"
    )
    distributions.install("clt-greet", "1.0", {"greet": source})
    assert "greet" in invoke("--help").stdout
    assert invoke("greet", "recipe.toml", "--set", "name=you").stdout == "hello you\n"
    assert invoke("greet", "recipe.toml", "--set", "name=3").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Stopped(ExitCode.GUARD, "loss is nan at step 3"), 3, "loss is nan at step 3"),
        (Stopped(ExitCode.INTERRUPTED, "interrupted at step 3"), 130, "interrupted at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Refused("model.path", "no such folder: x"), 2, "recipe.toml: model.path: no such folder: x"),
        (Refused("transcoder.features", "too many"), 2, "recipe.toml:6: transcoder.features: too many"),
        (Refused(Path("runs/x"), "already there"), 2, "runs/x: already there"),
        (ValueError("an: accident"), 1, "ValueError: an: accident (-v shows where)"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (PluginError("plugin 'x': broken"), 1, "plugin 'x': broken"),
        (RuntimeError("a\nb"), 1, "RuntimeError: a b (-v shows where)"),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(recipe: Recipe, **_: object) -> None:
        raise error

    replace_run(monkeypatch, fail)
    done = invoke("run", "recipe.toml")
    assert done.exit_code == code
    assert done.stderr.splitlines()[-1] == text
    assert "Traceback" not in done.stderr
    done = invoke("run", "recipe.toml", "-v")
    assert done.exit_code == code
    assert "Traceback" in done.stderr


def test_resume_takes_a_checkpoints_name_but_not_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace_run(monkeypatch, lambda recipe, **options: seen.append(options["resume"]))
    for arguments in (["--resume", "recipe.toml"], ["recipe.toml", "--resume"], ["recipe.toml"]):
        assert invoke("run", *arguments).exit_code == 0
    assert invoke("run", "recipe.toml", "--resume", "step_000100", "--out", "x").exit_code == 0
    assert invoke("run", "--resume", "100", "recipe.toml").exit_code == 0
    assert seen == ["latest", "latest", None, "step_000100", "100"]


def test_init_writes_a_recipe_that_is_valid_and_says_every_setting(recipe: Path) -> None:
    assert invoke("init", "-o", "new.toml").exit_code == ExitCode.OK
    done = invoke("validate", "new.toml")
    assert done.exit_code == ExitCode.OK, done.stderr
    text = Path("new.toml").read_text()
    # The lines below each head; settings that are not given are comments.
    heads = re.split(r"^#? ?(\[+\w+\]+).*$", text, flags=re.M)
    below: dict[str, str] = {}
    for head, lines in zip(heads[1::2], heads[2::2], strict=True):
        below[head.strip("[]")] = below.get(head.strip("[]"), "") + lines
    said = 0
    for name, table in tomllib.loads(done.stdout).items():
        for settings in table if isinstance(table, list) else [table]:
            for setting in settings if isinstance(settings, dict) else []:
                assert re.search(rf"^#?\s*{setting} =", below[name], re.M), f"{name}.{setting}"
                said += 1
    assert said > 50
    again = invoke("init", "-o", "new.toml")
    assert again.exit_code == ExitCode.USAGE
    assert "already there" in again.stderr
    assert invoke("init").stdout == text
