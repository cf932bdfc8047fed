"""Results on disk: which transcoder they are of, and which of them a resumed run keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clt_plugins import run
from clt_plugins.errors import Unreachable
from clt_plugins.files.folders import check_folder
from clt_plugins.finished.find import find_trained
from clt_plugins.finished.provenance import identify
from tests.support.helpers import plugins, tables
from tests.support.results import CONVERT, STAGES, content, evaluate, invoke, origin


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(**STAGES), out=folder)
    return folder


@pytest.fixture
def finished(complete, tmp_path) -> Path:
    """A run with all stages, in a folder of its own."""
    shutil.copytree(complete, tmp_path / "run")
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
