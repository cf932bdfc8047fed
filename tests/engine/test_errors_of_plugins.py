"""Whose error it is that a plugin raises, and what the user reads: the plugin's name or the recipe's line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clt_plugins import Faults, read_recipe
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode
from tests.support.helpers import tables
from tests.support.third_party import HEADER, RECIPE

LOSS = (
    HEADER
    + """
class Loss:
    needs_pre = False
    def selection(self, tokens, idle_tokens):
        return None
    def __call__(self, forward):
        pass  # step
        return {"mine": forward.features.values.sum() * 0}

def build(config, context):
    pass  # build
    return Loss()

@hookimpl
def clt_losses():
    return [Spec("mine", Config, build)]

@hookimpl
def clt_check(recipe):
    pass  # check
    return []
"""
)


@pytest.fixture
def ran(third_party: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Result]:
    """Runs RECIPE on the command line; the loss `mine` executes a statement in a phase: build, step or check."""

    def go(phase: str, statement: str) -> Result:
        third_party(LOSS.replace(f"pass  # {phase}", statement))
        (tmp_path / "recipe.toml").write_text(RECIPE)
        monkeypatch.chdir(tmp_path)
        return CliRunner().invoke(main_group, ["run", "recipe.toml"])

    return go


@pytest.mark.parametrize("phase", ["build", "step"])
def test_an_accidental_value_error_with_a_colon_is_the_plugins(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise ValueError("losses: too heavy")')
    assert done.exit_code == ExitCode.FAILED
    (line,) = [line for line in done.stderr.splitlines() if "too heavy" in line]
    number = LOSS.splitlines().index(f"    {'    ' * (phase == 'step')}pass  # {phase}") + 1
    assert line.startswith("recipe.toml:16: losses[1]: 'mine' of plugin 'mine' (clt-mine 1.0): failed in ")
    assert f"ValueError: losses: too heavy (clt_mine_mine.py:{number})" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("phase", ["build", "step"])
def test_a_full_disk_in_a_plugin_names_it_without_blaming_it(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise OSError(28, "No space left on device", "log.bin")')
    assert done.exit_code == ExitCode.FAILED
    line = done.stderr.splitlines()[-1]
    named = "losses[1]: 'mine' of plugin 'mine' (clt-mine 1.0)"
    assert line == f"{named}: [Errno 28] No space left on device: 'log.bin'"


def test_a_closed_pipe_is_not_an_error_of_the_plugin_that_wrote_into_it(ran: Any) -> None:
    done = ran("step", 'raise BrokenPipeError(32, "Broken pipe")')
    assert done.exit_code == ExitCode.FAILED
    assert "plugin" not in done.stderr


@pytest.mark.parametrize("phase", ["build", "step", "check"])
def test_what_a_plugin_refuses_is_the_users_and_has_the_recipes_line(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise Refused("losses[1].weight", "too heavy; use a smaller one")')
    assert done.exit_code == ExitCode.USAGE
    assert done.stderr.splitlines()[-1] == "recipe.toml:18: losses[1].weight: too heavy; use a smaller one"
    assert "plugin" not in done.stderr


def test_what_checks_refuse_is_told_with_the_complaints_of_others(third_party: Any, distributions: Any) -> None:
    third_party(LOSS.replace("pass  # check", 'raise Refused("train.lr", "too high")'))
    complaint = "from clt_plugins import *\n@hookimpl\ndef clt_check(recipe):\n    return ['seed: no luck in it']\n"
    distributions.install("clt-other", "1.0", {"other": complaint})
    with pytest.raises(Faults) as caught:
        read_recipe(tables())
    assert [fault.path for fault in caught.value.faults] == ["train.lr", "seed"]
