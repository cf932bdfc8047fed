"""Which folders the commands for a trained transcoder accept, and how plugins that fail in them are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clt_plugins import run
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode
from clt_plugins.files.folders import check_folder
from clt_plugins.finished.find import find_trained
from clt_plugins.recipe.read import as_toml
from tests.support.helpers import plugins, recipe, tables

CALIBRATION = [
    "--set=stages.convert.tokens=512",
    "--set=stages.convert.calibration_tokens=512",
    "--set=stages.convert.tolerance=0.05",
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


@pytest.fixture
def trained(tmp_path) -> Path:
    run(tables(), out=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["convert", "evaluate", "export", "thresholds", "top-activations"])
def test_a_wrong_folder_is_named_with_exit_code_2(command, tmp_path):
    rest = {
        "convert": ["--out", tmp_path / "out"],
        "evaluate": [],
        "export": ["--out", tmp_path / "out", "--format", "safetensors"],
        "thresholds": ["--out", tmp_path / "out"],
        "top-activations": ["--out", tmp_path / "out", "--features", "0:0"],
    }[command]

    def refused(folder: Path, text: str) -> None:
        done = invoke(command, folder, *rest)
        assert done.exit_code == ExitCode.USAGE, done.output
        assert text in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr

    refused(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "unfinished/checkpoints/step_000004").mkdir(parents=True)
    (tmp_path / "unfinished/recipe.toml").write_text(as_toml(recipe()))
    refused(tmp_path / "unfinished", "this run has no final transcoder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/letter.txt").write_text("hello")
    refused(tmp_path / "empty", "empty: n" if command == "export" else "empty: no")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inside", "path"),
    [
        ("", "."),
        ("transcoder", "."),
        ("transcoder", "./"),
        ("transcoder", "../transcoder/"),
        ("checkpoints", "step_000012/"),
        ("checkpoints/step_000012", "."),
        ("checkpoints", ".."),
    ],
)
def test_the_run_of_a_transcoder_is_found_from_any_working_directory(trained, inside, path, monkeypatch):
    monkeypatch.chdir(trained / inside)
    done = invoke("evaluate", path, "--json", "--set", "stages.evaluate.tokens=256")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == 256
    is_checkpoint = "step" in str(Path(inside) / path)
    folder = "evaluations/step_000012" if is_checkpoint else "evaluation"
    assert (trained / folder / "evaluation.json").is_file()


REST = {"convert": CALIBRATION, "evaluate": ["--set", "stages.evaluate.tokens=256"], "export": ["--format", "plain"]}

PLAIN_EXPORTER = '''
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """Writes a text."""

class Plain:
    def export(self, transcoder, folder):
        (folder / "inside").mkdir()
        (folder / "inside" / "text.txt").write_text("text")

@hookimpl
def clt_exporters():
    return [Spec("plain", Config, lambda config, context: Plain())]
'''


@pytest.mark.parametrize("out", [".", "./", "../here"])
@pytest.mark.parametrize("command", ["convert", "evaluate", "export"])
def test_the_working_directory_may_be_the_new_folder_if_it_is_empty(
    trained, tmp_path, command, out, monkeypatch, distributions
):
    distributions.module("plain_exporter", PLAIN_EXPORTER)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke(command, trained, "-p", "plain_exporter", "--out", out, *REST[command])
    assert done.exit_code == 0, done.output
    check_folder(tmp_path / "here")
    assert Path.cwd().samefile(tmp_path / "here"), "the shell's folder is still the same one"
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".")]
    again = invoke(command, trained, "-p", "plain_exporter", "--out", out, *REST[command])
    assert again.exit_code == ExitCode.USAGE and "already there: give another folder" in again.stderr


def test_a_new_folder_may_be_there_if_it_is_empty_also_by_a_link(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    done = invoke("convert", trained, "--out", f"{tmp_path}/link/", *CALIBRATION)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "empty/convert.json").is_file() and (tmp_path / "link").is_symlink()
    again = invoke("convert", trained, "--out", tmp_path / "link", *CALIBRATION)
    assert again.exit_code == ExitCode.USAGE and "already there" in again.stderr


def test_the_recipe_is_read_once(trained):
    found = find_trained(trained, plugins(), overrides=["train.steps=20"])
    first = found.recipe()
    (trained / "recipe.toml").unlink()
    assert found.recipe() is first and first.train.steps == 20
    with found.opened() as (context, source):
        assert context.recipe is first and context.n_layers == source.n_layers == 3


def test_a_transcoder_alone_has_no_recipe_and_says_what_to_do(trained, tmp_path):
    (trained / "transcoder").rename(tmp_path / "alone")
    alone = find_trained(tmp_path / "alone", plugins())
    assert alone.run is None and alone.transcoder().n_layers == 3
    for _ in range(2):
        with pytest.raises(ValueError, match=r"alone: no recipe\.toml with it .* give a recipe with --recipe"):
            alone.recipe()
    with pytest.raises(ValueError, match=r"^--set: there is no recipe to change"):
        find_trained(tmp_path / "alone", plugins(), overrides=["train.steps=20"])


EXPORTER = """
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''Fails.'''

class Failing:
    def export(self, transcoder, folder):
        raise ValueError("tying: a text with a colon")

@hookimpl
def clt_exporters():
    return [Spec("failing", Config, lambda config, context: Failing())]
"""


def test_a_plugin_that_fails_in_a_command_is_named(trained, distributions, tmp_path):
    distributions.module("failing_exporter", EXPORTER)
    done = invoke("export", trained, "--format", "failing", "-p", "failing_exporter", "--out", tmp_path / "out")
    assert done.exit_code == ExitCode.FAILED, done.output
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("plugin 'failing_exporter'") and "ValueError: tying: a text with a colon" in line
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_library_is_quiet_and_the_logger_tells_its_results(tmp_path, capfd, caplog):
    stages = {
        "convert": {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05},
        "evaluate": {"tokens": 256},
        "exports": [{"name": "safetensors"}],
    }
    with caplog.at_level(logging.INFO, "clt_plugins"):
        run(tables(**stages), out=tmp_path / "run")
    printed = capfd.readouterr()
    assert printed.out == "" and "held" not in printed.err and "saved" not in printed.err
    lines = "\n".join(caplog.messages).splitlines()
    for start in (
        "held-out NMSE ",
        "transcoder saved in ",
        "on 512 held-out tokens not calibrated on",
        f"{tmp_path}/run/exports/safetensors: written by",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, lines
