"""Plugins that `-p` names, by module or by file: what they offer, their commands, and what is said where they fail."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode

COMMANDS = '''
import click

from clt_plugins import Refused, hookimpl, with_recipe


@click.command()
@click.argument("what")
def histogram(what):
    """Print WHAT, or fail by it."""
    errors = {"bug": KeyError("gone"), "disk": OSError("no space"), "user": Refused("here", "wrong: mend it")}
    if what in errors:
        raise errors[what]
    click.echo(what)


@click.command()
@with_recipe
def loaded(recipe, plugins):
    """Print what -p has loaded."""
    click.echo(" ".join(info.name for info in plugins.infos if info.distribution == "by -p"))


@hookimpl
def clt_commands():
    return [histogram, loaded]
'''

RECIPE = """
name = "x"
source = "synthetic"
activation = "topk"
transcoder = { features = 64 }
train = { steps = 2 }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with modules that are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    (tmp_path / "mine.py").write_text(COMMANDS)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "below.py").write_text(COMMANDS)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from .inner import clt_commands")
    (tmp_path / "pack" / "inner.py").write_text(COMMANDS)
    (tmp_path / "r.toml").write_text(RECIPE)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mine", "below", "pack", "run_too", "broken"):
            del sys.modules[name]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main_group, arguments, prog_name="clt-plugins")


@pytest.mark.parametrize(
    "name", ["mine.py", "./mine.py", "sub/below.py", "pack/inner.py", "./pack", "pack/__init__.py"]
)
@pytest.mark.parametrize("order", ["before", "after", "joined"])
def test_a_file_is_loaded_and_its_commands_work(name: str, order: str) -> None:
    arguments = {
        "before": ["-p", name, "histogram", "5"],
        "after": ["histogram", "5", "-p", name],
        "joined": ["histogram", f"-p{name}", "5"],
    }[order]
    done = invoke(*arguments)
    assert (done.exit_code, done.output) == (ExitCode.OK, "5\n")


def test_a_command_gets_the_plugins_of_both_places() -> None:
    done = invoke("-p", "mine.py", "loaded", "r.toml", "-p", "./pack")
    assert done.output.split() == ["mine", "pack"]
    assert invoke("loaded", "r.toml", "-p", "sub/below.py").output.split() == ["below"]


def test_help_lists_a_files_commands() -> None:
    assert "histogram" in invoke("-p", "mine.py", "--help").output
    assert "histogram" not in invoke("--help").output


def test_a_files_absolute_path_needs_no_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert invoke("-p", str(folder / "mine.py"), "histogram", "5").output == "5\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("min.py", "-p: there is no file 'min.py': give a .py file, or the name of a module, did you mean 'mine.py'?"),
        ("sub/nothing.py", "-p: there is no file 'sub/nothing.py': give a .py file, or the name of a module"),
        ("min", "-p: there is no module 'min': give one that Python finds, or a file such as ./min.py, did you mean"),
        ("./json.py", "-p: ./json.py: another module is called 'json' ("),
        ("./two words.py", "-p: ./two words.py: Python cannot import 'two words': rename it"),
    ],
)
def test_a_misspelt_name_gets_one_line_with_a_remedy(folder: Path, name: str, text: str) -> None:
    (folder / "json.py").write_text(COMMANDS)
    (folder / "two words.py").write_text(COMMANDS)
    for arguments in (("-p", name, "histogram", "5"), ("validate", "r.toml", "-p", name)):
        done = invoke(*arguments)
        assert done.exit_code == ExitCode.USAGE
        assert done.output.startswith(text)
        assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        (
            "bug",
            ExitCode.FAILED,
            "plugin 'mine' (by -p): failed in the command 'histogram': KeyError: 'gone' (mine.py:13)",
        ),
        ("disk", ExitCode.FAILED, "plugin 'mine' (by -p): no space"),
        ("user", ExitCode.USAGE, "here: wrong: mend it\n"),
    ],
)
def test_an_error_in_a_command_names_plugin_and_line(what: str, code: ExitCode, text: str) -> None:
    for arguments in (("-p", "mine.py", "histogram", what), ("histogram", what, "-p", "mine.py")):
        done = invoke(*arguments)
        assert done.exit_code == code
        assert done.output.startswith(text.replace("MINE", "plugin 'mine' (by -p)"))


def test_a_command_with_a_name_of_the_engines_is_refused_by_name(folder: Path) -> None:
    (folder / "run_too.py").write_text(COMMANDS.replace("def histogram", "def run").replace("[histogram", "[run"))
    done = invoke("plugins", "run_too", "-p", "run_too.py")
    assert done.exit_code == ExitCode.FAILED
    assert "'run' is a command of clt-plugins itself: give it another name" in done.output


CHOICES = """
from attrs import frozen

from clt_plugins import Batch, Spec, hookimpl


@frozen(kw_only=True)
class Config:
    '''Wrong in one way.'''
    FIELD


class Loss:
    needs_pre = False

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        return {"broken": TERM}


class Source:
    n_layers, d_model = 4, 32

    def next(self):
        import torch
        return torch.zeros(3)

    def held_out(self, tokens):
        import torch
        yield Batch(torch.randn(4, 4, 32), torch.randn(4, 4, 32))

    statistics = lambda self: None
    state = lambda self: {}
    load_state = lambda self, state: None


class Logger:
    def start(self, recipe, step):
        raise OSError("no network")

    def log(self, step, metrics):
        pass

    def close(self, status):
        pass


def make(config, context):
    BUILD
    return Loss()


@hookimpl
def clt_losses():
    return [Spec("broken", Config, make)]


@hookimpl
def clt_sources():
    return [Spec("broken", Config, lambda config, context: Source())]


@hookimpl
def clt_loggers():
    return [Spec("broken", Config, lambda config, context: Logger())]
"""


def choices(folder: Path, **changes: str) -> None:
    right = {"FIELD": "", "TERM": "(forward.reconstruction - forward.targets).square().mean()", "BUILD": "pass"}
    text = CHOICES
    for word, new in {**right, **changes}.items():
        text = text.replace(word, new)
    (folder / "broken.py").write_text(dedent(text))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"FIELD": "weight = 1e-3"}, "Config.weight: has no type, so that no recipe can set it: write `weight: float"),
        ({"TERM": "forward.reconstruction.detach().square().mean()"}, "loss 'broken'"),
        ({"TERM": "forward.reconstruction.sum() / 0 * 0"}, "a finite term 'broken'"),
        ({"BUILD": "config.nothing"}, "broken.py:LINE in make"),
    ],
)
def test_check_finds_what_is_wrong_without_a_run(folder: Path, changes: dict[str, str], text: str) -> None:
    choices(folder, **changes)
    done = invoke("plugins", "broken", "-p", "broken.py", "--check")
    assert done.exit_code == ExitCode.FAILED
    lines = (folder / "broken.py").read_text().splitlines()
    number = next((n for n, line in enumerate(lines, 1) if "config.nothing" in line), 0)
    assert text.replace("LINE", str(number)) in done.output


def test_a_source_that_returns_no_batch_and_a_logger_without_network_are_named(folder: Path) -> None:
    choices(folder)
    done = invoke("run", "r.toml", "-p", "broken.py", "--set", "source.name=broken", "--out", "one")
    assert "source: 'broken' of plugin 'broken' (by -p)" in done.output
    assert "`next` must return a Batch, Source returned tensor([0., 0., 0.])" in done.output
    done = invoke("run", "r.toml", "-p", "broken.py", "--set", 'loggers=["broken"]', "--out", "two")
    assert "loggers[0]: 'broken' of plugin 'broken' (by -p): no network" in done.output
