"""Results on disk: which transcoder they are of, which of them a resumed run keeps, and what is never lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clt_plugins import run
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode, Unreachable
from clt_plugins.files.folders import check_folder
from clt_plugins.finished.find import find_trained
from clt_plugins.finished.provenance import identify
from tests.support.helpers import plugins, tables

CONVERT = {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05}
STAGES = {"convert": CONVERT, "evaluate": {"tokens": 256}, "exports": [{"name": "safetensors"}]}
FEW = ["--set", "stages.evaluate.tokens=256"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


def evaluate(place: Path, *arguments: object) -> dict[str, Any]:
    done = invoke("evaluate", place, "--json", *FEW, *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def origin(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["made_from"]["transcoder"]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(**STAGES), out=folder)
    return folder


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(), out=folder)
    return folder


@pytest.fixture
def finished(complete, tmp_path) -> Path:
    """A run with all stages, in a folder of its own."""
    shutil.copytree(complete, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def trained(simple, tmp_path) -> Path:
    """A run that only trained, in a folder of its own."""
    shutil.copytree(simple, tmp_path / "run")
    return tmp_path / "run"


# -- which transcoder -------------------------------------------------------------------------------------------------


def test_results_name_the_transcoder_that_they_were_made_from(complete):
    made = origin(complete / "converted/convert.json")
    assert made == {
        "folder": "transcoder",
        "sha256": identify(complete / "transcoder").sha256,
        "step": 12,
        "tokens": 192,
        "hub": None,
        "converted_from": None,
    }
    for file in ("evaluation/evaluation.json", "exports/safetensors/export.json"):
        judged = origin(complete / file)
        assert judged["folder"] == "converted" and judged["step"] == 12, file
        assert judged["sha256"] == identify(complete / "converted").sha256 != made["sha256"]
        assert judged["converted_from"] == made
    settings = json.loads((complete / "evaluation/evaluation.json").read_text())["made_from"]["settings"]
    assert settings["evaluate"]["tokens"] == 256 and settings["source"]["name"] == "synthetic"


def test_a_copy_has_the_digest_of_its_original_and_another_step_has_another(complete, tmp_path):
    last, earlier = (identify(complete / f"checkpoints/step_0000{step}") for step in ("12", "08"))
    assert last.sha256 == identify(complete / "transcoder").sha256, "the last checkpoint is the final transcoder"
    assert (earlier.step, earlier.tokens) == (8, 128) and earlier.sha256 != last.sha256
    shutil.copytree(complete / "checkpoints/step_000008", tmp_path / "best")
    assert identify(tmp_path / "best").sha256 == earlier.sha256
    exported = identify(complete / "exports/safetensors")
    assert exported.sha256 is not None and exported.step is None
    (tmp_path / "foreign").mkdir()
    assert identify(tmp_path / "foreign").sha256 is None


def test_an_evaluation_of_another_transcoder_has_a_folder_of_its_own(finished):
    shutil.copytree(finished / "checkpoints/step_000008", finished / "best")
    before = content(finished / "evaluation")
    for place, name, step in (
        ("checkpoints/step_000004", "step_000004", 4),
        ("best", "best", 8),
        ("transcoder", "transcoder", 12),
    ):
        report = evaluate(finished / place)
        file = finished / "evaluations" / name / "evaluation.json"
        assert json.loads(file.read_text()) == report
        assert (origin(file)["folder"], origin(file)["step"]) == (name, step)
    assert content(finished / "evaluation") == before, "the final one is judged as before"
    assert evaluate(finished)["made_from"]["transcoder"]["folder"] == "converted"
    assert not list(finished.glob("evaluation-*")), "the same transcoder again replaces its report"


def test_a_report_on_another_transcoder_is_moved_aside(trained):
    evaluate(trained)
    before = content(trained / "evaluation")
    sha256 = origin(trained / "evaluation/evaluation.json")["sha256"]
    assert (
        invoke(
            "convert",
            trained,
            "--out",
            trained / "converted",
            *(f"--set=stages.convert.{k}={v}" for k, v in CONVERT.items()),
        )
    ).exit_code == 0
    assert evaluate(trained)["made_from"]["transcoder"]["folder"] == "converted"
    assert content(trained / f"evaluation-{sha256[:8]}") == before


def test_a_conversion_of_an_older_transcoder_is_not_taken_silently(finished, caplog):
    assert find_trained(finished, plugins()).folder == finished / "converted"
    run(tables(train={"steps": 16}), out=finished, resume="latest")
    found = find_trained(finished, plugins())
    assert found.folder == finished / "transcoder"
    (line,) = [record.message for record in caplog.records if "another transcoder" in record.message]
    assert "converted was made from another transcoder than" in line
    assert (finished / "converted/convert.json").is_file() and find_trained(
        finished / "converted", plugins()
    ).report_folder() == finished / "evaluations/converted"


# -- what a resumed run keeps -----------------------------------------------------------------------------------------


def test_resuming_a_finished_run_keeps_its_results_and_says_so(finished, caplog):
    (finished / "exports/for-a-colleague").mkdir()
    (finished / "exports/for-a-colleague/letter.txt").write_text("hello")
    folders = ("converted", "evaluation", "exports/safetensors", "exports/for-a-colleague")
    before = {name: (content(finished / name), (finished / name).stat().st_ino) for name in folders}
    with caplog.at_level("INFO", "clt_plugins"):
        run(tables(**STAGES), out=finished, resume="latest")
    assert {name: (content(finished / name), (finished / name).stat().st_ino) for name in folders} == before
    kept = [message for message in caplog.messages if message.endswith("made from this transcoder with these settings")]
    assert [line.split(": ")[0] for line in kept] == [str(finished / name) for name in folders[:3]]


def test_a_recipe_that_asks_for_nothing_more_removes_nothing(finished):
    before = {name: content(finished / name) for name in ("converted", "evaluation", "exports")}
    run(tables(), out=finished, resume="latest")
    assert {name: content(finished / name) for name in before} == before


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"evaluate": {"tokens": 128}}, {"evaluation"}),
        ({"exports": [{"name": "safetensors", "dtype": "bfloat16"}]}, {"exports/safetensors"}),
        ({"convert": {**CONVERT, "thresholds": "cut"}}, {"converted", "evaluation", "exports/safetensors"}),
    ],
)
def test_what_has_other_settings_is_made_anew(finished, changes, new):
    folders = ("converted", "evaluation", "exports/safetensors")
    before = {name: (finished / name).stat().st_ino for name in folders}
    run(tables(**{**STAGES, **changes}), out=finished, resume="latest")
    assert {name for name in folders if (finished / name).stat().st_ino != before[name]} == new
    for name in folders:
        check_folder(finished / name)


def test_a_damaged_result_is_made_anew(finished):
    file = finished / "evaluation/evaluation.json"
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:100])
    run(tables(**STAGES), out=finished, resume="latest")
    assert json.loads(file.read_text())["nmse"] == pytest.approx(whole["nmse"], rel=1e-6)


def test_what_a_user_put_into_a_result_is_moved_aside_with_it(finished):
    (finished / "exports/safetensors/notes.txt").write_text("mine")
    changed = {**STAGES, "exports": [{"name": "safetensors", "dtype": "bfloat16"}]}
    run(tables(**changed), out=finished, resume="latest")
    assert (finished / "exports/safetensors-older/notes.txt").read_text() == "mine"
    check_folder(finished / "exports/safetensors")


def test_a_stage_that_fails_leaves_all_older_results(finished):
    before = {name: content(finished / name) for name in ("converted", "evaluation", "exports")}
    changed = {**STAGES, "convert": {**CONVERT, "l0": 9.9}}
    with pytest.raises(Unreachable, match="layer 0 cannot reach"):
        run(tables(**changed, train={"steps": 16}), out=finished, resume="latest")
    assert {name: content(finished / name) for name in before} == before
    assert find_trained(finished, plugins()).folder == finished / "transcoder", "the conversion is of an older one"


# -- what can fail cheaply --------------------------------------------------------------------------------------------

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
def test_a_logger_that_is_not_installed_blocks_no_command(logged, command, tmp_path):
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
        assert "logger 'mine' is of no installed plugin" in done.stderr or "mine" not in done.stderr


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
