"""Stages of any plugin: their order, what stands when one fails, and those that also run during training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode, PluginError, Stopped
from clt_plugins.files.folders import check_folder
from clt_plugins.finished.provenance import identify
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.toml import toml_text
from tests.support.helpers import tables

STAGE = '''
import os
from pathlib import Path
from attrs import evolve, field, frozen
from clt_plugins import FREE_ON_RESUME, Selected, Spec, StageInfo, hookimpl

CALLS = []

@frozen(kw_only=True)
class Config:
    """Notes what it gets."""
    folder: str = "note"
    """Where."""
    text: str = ""
    """What."""
    every: int | None = field(default=None, metadata=FREE_ON_RESUME)
    """How often."""
    ranks: str = "one"
    """Who."""
    draws: int = 0
    """Random numbers of torch, and batches of the source."""
    halves: bool = False
    """Returns a transcoder with half the weights."""
    fails_at: int = -1
    """A step."""
    how: str = "error"
    """To fail."""

class Note:
    def __init__(self, config):
        self.config = config
        self.info = StageInfo(folder=config.folder, every=config.every, ranks=config.ranks,
                              returns_transcoder=config.halves)

    def check(self, job):
        return job.transcoder if self.config.halves else None

    def run(self, job):
        import torch
        step = job.transcoder.step
        CALLS.append((self.config.folder, step))
        for _ in range(self.config.draws):
            torch.rand(1)
            job.source.next()
        (job.folder / "note.txt").write_text(f"{self.config.text} {step} {float(job.transcoder.W_enc.sum())}")
        job.log({"note/sum": float(job.transcoder.W_enc.sum())})
        if self.config.fails_at == step:
            if self.config.how == "interrupt":
                raise KeyboardInterrupt
            raise RuntimeError(f"no note at {step}")
        if self.config.halves:
            half = job.transcoder.clone()
            half.W_enc.data /= 2
            return half

@hookimpl
def clt_stages():
    return [Spec("note", Config, lambda config, context: Note(config))]
'''


@pytest.fixture
def noting(distributions) -> Plugins:
    distributions.module("my_note", STAGE)
    return load_plugins(extra=["my_note"])


def calls() -> list[tuple[str, int]]:
    import my_note

    out = list(my_note.CALLS)
    my_note.CALLS.clear()
    return out


def note(**settings: Any) -> dict[str, Any]:
    return {"name": "note", **settings}


def weights(folder: Path) -> bytes:
    return (folder / "transcoder" / "transcoder.safetensors").read_bytes()


def metrics(run_folder: Path, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


# -- after training ---------------------------------------------------------------------------------------------------


def test_stages_run_in_their_order_and_each_gets_what_the_last_one_returned(noting, tmp_path):
    stages = [note(folder="before"), note(folder="half", halves=True), note(folder="after")]
    returned = run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    before, half, after = (
        float((tmp_path / "run" / name / "note.txt").read_text().split()[-1]) for name in ("before", "half", "after")
    )
    assert before == half and after == pytest.approx(before / 2)
    assert float(returned.W_enc.sum()) == pytest.approx(after)
    saved = CrossLayerTranscoder.load(tmp_path / "run/half")
    assert float(saved.W_enc.sum()) == after
    made = json.loads((tmp_path / "run/after/stage.json").read_text())["made_from"]["transcoder"]
    trained = identify(tmp_path / "run/transcoder")
    assert made["folder"] == "half" and made["sha256"] == identify(tmp_path / "run/half").sha256 != trained.sha256
    assert made["converted_from"]["sha256"] == trained.sha256 and made["step"] == 12
    calls()
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == [], "all stand"
    stages[1]["text"] = "other"
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == [("half", 12)], "the same transcoder comes out, so what follows stands"
    del stages[1]
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == [("after", 12)]


def test_when_a_stage_is_free_of_a_setting_its_result_stands(noting, tmp_path):
    run(tables(stages=[note()]), out=tmp_path / "run", plugins=noting)
    calls()
    run(tables(stages=[note(every=4)]), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == []


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_stage_that_fails_is_named_and_resume_does_the_rest(how, noting, tmp_path, caplog):
    stages = [note(folder="one"), note(folder="two", fails_at=12, how=how), note(folder="three")]
    error = PluginError if how == "error" else Stopped
    with pytest.raises(error):
        run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    assert ("stages[1] 'note' failed; results of other stages stay" in caplog.messages) == (how == "error")
    check_folder(tmp_path / "run/one")
    assert not (tmp_path / "run/two").exists() and not list((tmp_path / "run").glob(".two*"))
    assert calls() == [("one", 12), ("two", 12)]
    stages[1]["fails_at"] = -1
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == [("two", 12), ("three", 12)]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (
            [note(), note()],
            "stages[1]: 'note' writes note/, and stages[0] 'note' writes note/: give one of them another folder",
        ),
        ([note(folder="a"), note(folder="a/b")], "stages[1]: 'note' writes a/b/, and stages[0] 'note' writes a/:"),
        ([note(every=3)], "stages[0].every: 3 is no multiple of train.checkpoint_every (4): it runs on checkpoints"),
        (
            [note(), note(folder="b", ranks="all")],
            "stages[1]: 'note' runs on all ranks, and stages[0] 'note' before it on one: put it first",
        ),
    ],
)
def test_stages_that_cannot_be_together_are_refused_before_training(noting, tmp_path, stages, text):
    (tmp_path / "r.toml").write_text(toml_text(tables(stages=stages)))
    for command in (["run", "--out", tmp_path / "run"], ["plan"]):
        done = invoke(command[0], tmp_path / "r.toml", "-p", "my_note", *command[1:])
        assert done.exit_code == ExitCode.USAGE
        (line,) = done.stderr.strip().splitlines()
        assert text in line and line.startswith(f"{tmp_path / 'r.toml'}:")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["transcoder", "checkpoints/x", "../x", "/x", ".x", "", "a//b", "stages"])
def test_a_stage_cannot_write_where_the_run_does(noting, tmp_path, folder):
    with pytest.raises(PluginError, match="must name a folder below the run's"):
        run(tables(stages=[note(folder=folder)]), out=tmp_path / "run", plugins=noting)


# -- old tables and --set ---------------------------------------------------------------------------------------------


def test_tables_of_old_recipes_are_refused_with_the_new_lines(tmp_path):
    old = {**tables(), "convert": {"l0": 3.0}, "evaluate": {}, "exports": ["safetensors", {"name": "safetensors"}]}
    (tmp_path / "r.toml").write_text(toml_text(old))
    done = invoke("validate", tmp_path / "r.toml")
    assert done.exit_code == ExitCode.USAGE
    texts = [line.split(": ", 1)[1] for line in done.stderr.strip().splitlines()]
    stages = [
        '{name = "convert", l0 = 3.0}',
        '{name = "evaluate"}',
        '{name = "export", format = {name = "safetensors"}}',
        '{name = "export", format = {name = "safetensors"}, folder = "safetensors.2"}',
    ]
    assert texts == [
        f"{table}: has moved to [[stages]]: write `stages = [{', '.join(stages)}]` above the first [table]"
        for table in ("convert", "evaluate", "exports")
    ]
    new = {**tables(), "stages": "@"}
    (tmp_path / "n.toml").write_text(toml_text(new).replace('"@"', f"[{', '.join(stages)}]"))
    assert invoke("validate", tmp_path / "n.toml").exit_code == 0


@pytest.mark.parametrize(
    ("flag", "index", "key", "value"),
    [
        ("stages.evaluate.tokens=77", 1, "tokens", 77),
        ("stages.1.tokens=77", 1, "tokens", 77),
        ("stages[1].tokens=77", 1, "tokens", 77),
        ("stages.export.format.dtype=bfloat16", 2, "dtype", "bfloat16"),
        ("stages.note.text=hello", 3, "text", "hello"),
    ],
)
def test_a_setting_of_a_stage_is_named_by_the_stage_or_its_number(noting, flag, index, key, value):
    from clt_plugins.recipe.read import read_recipe

    given = tables(convert={}, evaluate={}, exports=["safetensors"])
    config = read_recipe(given, [flag], noting).stages[index].config
    assert getattr(config.format if index == 2 else config, key, None) == value or (
        index == 2 and config.format.config.dtype == value
    )


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("stages.evaluate.tokens=0", "must be > 0: 0"),
        ("stages.evalute.tokens=1", "unknown name 'evalute', did you mean 'evaluate'?"),
        ("stages.export.folder=x", "stages has 2 items 'export': say stages.1 or stages.2"),
        ("evaluate.tokens=1", "has moved: write --set stages.evaluate.tokens=1"),
        ("stages.9.folder=x", "stages has 3 items, counted from 0"),
    ],
)
def test_a_faulty_setting_of_a_stage_names_the_flag(tmp_path, flag, text):
    given = tables(evaluate={}, exports=["safetensors", {"format": "safetensors", "folder": "b"}])
    (tmp_path / "r.toml").write_text(toml_text(given))
    done = invoke("validate", tmp_path / "r.toml", "--set", flag)
    assert done.exit_code == ExitCode.USAGE and done.stderr.startswith(f"--set {flag}: {text}"), done.stderr


# -- during training --------------------------------------------------------------------------------------------------


def test_stages_at_checkpoints_get_the_checkpoint_and_leave_training_as_it_was(noting, tmp_path):
    run(tables(), out=tmp_path / "plain", plugins=noting)
    stages = [note(folder="half", halves=True, every=8, draws=3), note(folder="deep/after", every=4, draws=1)]
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    assert calls() == [("deep/after", 4), ("half", 8), ("deep/after", 8), ("half", 12), ("deep/after", 12)]
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    folder = tmp_path / "run/stages/step_000008"
    made = json.loads((folder / "deep/after/stage.json").read_text())["made_from"]["transcoder"]
    assert (made["folder"], made["step"]) == ("half", 8)
    assert made["converted_from"]["sha256"] == identify(tmp_path / "run/checkpoints/step_000008").sha256
    sums = [float((folder / name / "note.txt").read_text().split()[-1]) for name in ("half", "deep/after")]
    assert sums[1] == pytest.approx(sums[0] / 2)
    # In the run's own log, at the steps.
    logged = metrics(tmp_path / "run", "note/sum")
    assert [step for step, _ in logged] == [4, 8, 8] and [number for _, number in logged[1:]] == sums
    assert sorted(path.name for path in (tmp_path / "run/stages").iterdir()) == ["step_000004", "step_000008"]


def test_a_stage_that_fails_during_training_does_not_end_it_and_is_raised_at_the_end(noting, tmp_path, caplog):
    run(tables(), out=tmp_path / "plain", plugins=noting)
    stages = [note(folder="a", every=4, fails_at=8), note(folder="b", every=4)]
    with pytest.raises(PluginError, match="no note at 8"):
        run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    assert "step 8: no note at 8; training goes on, and the run ends with this error" in caplog.messages
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    for name in ("stages/step_000004/a", "stages/step_000004/b", "a", "b"):
        check_folder(tmp_path / "run" / name)
    assert not (tmp_path / "run/stages/step_000008/a").exists()


def test_a_run_that_is_broken_off_in_a_stage_does_it_first_when_it_goes_on(noting, tmp_path):
    stages = [note(folder="a", every=4), note(folder="b", every=4, fails_at=8, how="interrupt")]
    with pytest.raises(Stopped):
        run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    assert calls() == [("a", 4), ("b", 4), ("a", 8), ("b", 8)]
    stages[1]["fails_at"] = -1
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="latest")
    assert calls() == [("b", 8), ("a", 12), ("b", 12)], "neither lost nor double"
    run(tables(), out=tmp_path / "plain", plugins=noting)
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")


def test_results_of_a_history_that_is_left_are_set_aside(noting, tmp_path):
    stages = [note(folder="a", every=4)]
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting)
    calls()
    run(tables(stages=stages), out=tmp_path / "run", plugins=noting, resume="step_000004")
    assert calls() == [("a", 8)], "the last transcoder is the same"
    assert (tmp_path / "run/stages/set_aside/1/step_000008/a/note.txt").is_file()
    steps = [step for step, _ in metrics(tmp_path / "run", "note/sum")]
    assert steps == [4, 8], "logged anew, since loggers drop what comes after the checkpoint"
