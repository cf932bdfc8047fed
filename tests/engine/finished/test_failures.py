"""What fails while results are made: a logger, a plugin that is not there, a folder, the disk. No result is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import run
from clt_plugins.errors import ExitCode
from clt_plugins.files.folders import check_folder
from tests.support.helpers import tables
from tests.support.results import CONVERT, FEW, STAGES, content, evaluate, invoke

LOGGER = '''
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """Fails."""
    at: str = ""
    """Where."""

class Logger:
    def __init__(self, at):
        self.at = at
        self._fail("build")

    def _fail(self, place):
        if self.at == place:
            raise RuntimeError("cannot " + place)

    def start(self, recipe, step):
        self._fail("start")

    def log(self, step, metrics):
        self._fail("log")

    def close(self, status):
        self._fail("close")

@hookimpl
def clt_loggers():
    return [Spec("mine", Config, lambda config, context: Logger(config.at))]
'''


@pytest.fixture
def logged(trained, distributions) -> Path:
    """A run whose recipe has a logger of another distribution."""
    distributions.module("my_logger", LOGGER)
    recipe = (trained / "recipe.toml").read_text()
    (trained / "recipe.toml").write_text(recipe + '\n[[loggers]]\nname = "mine"\n')
    return trained


@pytest.mark.parametrize("at", ["build", "start", "log", "close"])
def test_a_logger_that_fails_does_not_take_the_evaluation_away(logged, at):
    done = invoke("evaluate", logged, *FEW, "-p", "my_logger", "--set", f'loggers=[{{name="mine",at="{at}"}}]')
    assert done.exit_code == ExitCode.FAILED, done.output
    assert "held out, 256 tokens" in done.stdout
    assert done.stderr.strip().splitlines()[-1].count(f"RuntimeError: cannot {at}") == 1
    assert "my_logger" in done.stderr
    assert json.loads((logged / "evaluation/evaluation.json").read_text())["tokens"] == 256
    check_folder(logged / "evaluation")


def test_in_a_run_a_logger_that_fails_does_not_take_later_stages_away(trained, distributions):
    distributions.module("my_logger", LOGGER)
    from clt_plugins.errors import PluginError
    from clt_plugins.registry.plugins import load_plugins

    stages = {**STAGES, "loggers": [{"name": "mine", "at": "log"}]}
    # No step is left to do, so the logger first fails in the evaluation.
    with pytest.raises(PluginError, match=r"my_logger.*cannot log"):
        run(tables(**stages), out=trained, resume="latest", plugins=load_plugins(extra=["my_logger"]))
    for name in ("converted", "evaluation", "exports/safetensors"):
        check_folder(trained / name)


@pytest.mark.parametrize("command", ["evaluate", "convert", "export"])
def test_a_logger_that_is_not_installed_blocks_no_command(logged, command, tmp_path, caplog):
    rest = {
        "evaluate": FEW,
        "convert": ["--out", tmp_path / "out", *(f"--set=stages.convert.{k}={v}" for k, v in CONVERT.items())],
        "export": ["--out", tmp_path / "out", "--format", "safetensors"],
    }[command]
    place = logged
    if command == "export":
        assert invoke("convert", logged, "--out", logged / "converted", *(
            f"--set=stages.convert.{k}={v}" for k, v in CONVERT.items()
        )).exit_code == 0  # fmt: skip
    done = invoke(command, place, *rest)
    assert done.exit_code == 0, done.output
    if command == "evaluate":
        assert "logger 'mine' is of no installed plugin" in caplog.text


def test_what_was_only_for_training_is_not_needed(trained):
    """A loss, an exporter, a parallel choice, and a distribution that are not here."""
    file = trained / "recipe.toml"
    text = (
        file.read_text().replace('name = "mse"', 'name = "of_another_plugin"').replace('name = "single"', 'name = "x"')
    )
    assert text.count("of_another_plugin") == 1
    file.write_text('requires = ["no-such-distribution>=3"]\n' + text.replace("requires = []", ""))
    assert evaluate(trained)["tokens"] == 256
    refused = invoke("validate", file)
    assert refused.exit_code == ExitCode.USAGE, "training needs them"


@pytest.mark.parametrize("command", ["evaluate", "convert", "export"])
def test_a_folder_that_cannot_be_written_is_refused_before_work(trained, command, tmp_path, monkeypatch):
    def no_work(*arguments: Any) -> None:
        raise AssertionError("the transcoder was loaded")

    monkeypatch.setattr("clt_plugins.finished.find.Trained.transcoder", no_work)
    (tmp_path / "file").write_text("")
    rest = ["--format", "safetensors"] if command == "export" else []
    done = invoke(command, trained, "--out", tmp_path / "file" / "out", *rest)
    assert done.exit_code == ExitCode.USAGE, done.output
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("the transcoder in")]
    assert line.startswith(f"{tmp_path / 'file' / 'out'}: cannot be written (") and line.endswith("with --out")


@pytest.mark.parametrize("command", ["evaluate", "convert"])
def test_a_full_disk_leaves_the_table_and_the_exit_code(trained, command, tmp_path, monkeypatch):
    def full(path: Path, data: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    evaluate(trained)
    before = content(trained / "evaluation")
    monkeypatch.setattr("clt_stages.stages.write_json", full)
    rest = FEW if command == "evaluate" else ["--out", tmp_path / "out"]
    changes = [f"--set=stages.convert.{k}={v}" for k, v in CONVERT.items()]
    done = invoke(command, trained, *rest, *(changes if command == "convert" else []))
    assert done.exit_code == ExitCode.FAILED
    assert "NMSE" in done.stdout and "L0" in done.stdout
    assert "could not be written: " in done.stderr and "No space left on device" in done.stderr
    assert content(trained / "evaluation") == before
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob(".*partial"))


@pytest.mark.parametrize("at", ["clt_stages.evaluate.score", "clt_stages.stages.write_json"])
def test_an_interrupted_evaluation_leaves_the_old_report(trained, at, monkeypatch):
    evaluate(trained)
    before = content(trained / "evaluation")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(at, interrupt)
    done = invoke("evaluate", trained, *FEW)
    assert done.exit_code == ExitCode.INTERRUPTED
    assert done.stderr.strip().splitlines()[-1] == "interrupted"
    assert content(trained / "evaluation") == before
    assert not list(trained.glob(".*partial")) and not list(trained.glob("evaluation-*"))
