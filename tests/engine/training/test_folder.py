"""The folder of a run: one process, one history, whole files, and nothing of the user's touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from clt_plugins import run
from clt_plugins.errors import Faults, Stopped
from clt_plugins.files.folders import MANIFEST, read_tensors
from clt_plugins.recipe.read import as_toml
from clt_plugins.registry.plugins import load_plugins
from tests.support.commands import start
from tests.support.helpers import recipe, tables

INTERRUPTING = "tests.support.interrupting"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def started(folder: Path, *flags: str, **changes) -> subprocess.Popen[str]:
    """A run in another process."""
    file = folder.with_suffix(".toml")
    file.write_text(as_toml(recipe(**changes)))
    return start("-m", "clt_plugins", "run", file, "--out", folder, *flags, stdout=subprocess.DEVNULL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def interrupted(folder: Path, at: int, resume: str | None = None, **train) -> None:
    """A run, or a resumed one, that Ctrl-C stops."""
    stopping = tables(loggers=[{"name": "jsonl"}, {"name": "interrupt", "at": at}], train={"log_every": 1, **train})
    with pytest.raises(Stopped, match=f"interrupted at step {at}, checkpoint written"):
        run(stopping, out=folder, resume=resume, plugins=load_plugins(extra=[INTERRUPTING]))


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--resume",)], ids=["new", "resumed"])
def test_a_second_process_in_a_folder_is_refused_with_the_name_of_the_first(tmp_path, flags):
    folder = tmp_path / "run"
    # Refused while the first one builds, long before its first file.
    first = started(folder, train={"steps": 100_000, "log_every": 1000, "checkpoint_every": 100, "eval_every": 100_000})
    try:
        wait_for(folder / "run.lock" if not flags else folder / "checkpoints/step_000100")
        with pytest.raises(Faults, match=f"another run is in it: process {first.pid} on {os.uname().nodename}"):
            run(tables(), out=folder, resume="latest" if flags else None)
    finally:
        first.kill()
        first.wait()
    if flags:
        # What a killed process leaves locks nothing.
        step = int(names(folder / "checkpoints")[-1].removeprefix("step_"))
        run(tables(train={"steps": step, "lr": 1e-3}), out=folder, resume="latest")
        assert "run.lock" not in names(folder)


def test_runs_without_a_folder_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    for _ in range(2):
        run(tables(train={"steps": 1}))
    assert names(tmp_path / "runs/small") == ["20260101-000000", "20260101-000000-2"]
    run(tables(train={"steps": 2}), resume="latest")
    assert (tmp_path / "runs/small/20260101-000000-2/checkpoints/step_000002").is_dir(), "the newest is resumed"
    newest = tmp_path / "runs/small/20260101-000000-3"
    newest.mkdir()
    (newest / "recipe.toml").write_text("steps = 2")  # killed before its first checkpoint
    run(tables(train={"steps": 3}), resume="latest")
    assert (newest / "checkpoints/step_000003").is_dir(), "also without a checkpoint"


def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(Faults):
        run(tables(evaluate={"model_tokens": 64}), out=tmp_path / "a/b")
    assert names(tmp_path) == []


# -- one history -------------------------------------------------------------------------------------------------------


def test_going_back_sets_later_checkpoints_aside_so_that_the_latest_is_of_this_history(tmp_path):
    folder = tmp_path / "run"
    run(tables(), out=folder)
    left = read_tensors(folder / "checkpoints/step_000012/transcoder.safetensors")
    interrupted(folder, 6, resume="step_000004", lr=1e-3, checkpoint_every=100)
    assert names(folder / "checkpoints") == ["set_aside", "step_000004", "step_000006"]
    assert names(folder / "checkpoints/set_aside/1") == ["step_000008", "step_000012"]
    aside = read_tensors(folder / "checkpoints/set_aside/1/step_000012/transcoder.safetensors")
    assert all(torch.equal(value, aside[name]) for name, value in left.items())
    run(tables(train={"lr": 1e-3}), out=folder, resume="latest")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) >= {4, 5, 6, 8, 12}
    starts = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(one["step"], one["checkpoint"]) for one in starts] == [(0, None), (4, "step_000004"), (6, "step_000006")]
    assert starts[1]["changed"]["train.lr"] == [1e-2, 1e-3]
    run(tables(), out=folder, resume="step_000004")
    assert names(folder / "checkpoints/set_aside") == ["1", "2"], "nothing is overwritten"


def test_history_says_how_each_start_ended(tmp_path):
    folder = tmp_path / "run"
    interrupted(folder, 6)
    with pytest.raises(Stopped, match="not finite"):
        run(tables(train={"lr": 1e30, "log_every": 1}), out=folder, resume="latest", accept=["train.lr"])
    run(tables(), out=folder, resume="latest", accept=["train.lr"])
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(one["step"], one["end"]["status"]) for one in entries] == [
        (0, "interrupted"),
        (6, "failed"),
        (6, "finished"),
    ]
    assert "interrupted at step 6" in entries[0]["end"]["error"]
    assert "not finite" in entries[1]["end"]["error"] and not entries[2]["end"]["error"]


def test_history_does_not_take_another_error_for_the_end_of_a_run(tmp_path):
    """Neither one that the caller is handling, nor that of a later start with the same number of process and host, as
    in a container that is started again."""
    try:
        raise RuntimeError("the first attempt")
    except RuntimeError:
        run(tables(), out=tmp_path / "run")
    history = tmp_path / "run" / "history.jsonl"
    entry = json.loads(history.read_text())
    assert entry["end"]["status"] == "finished" and not entry["end"]["error"]
    del entry["end"]  # as if it had been killed
    history.write_text(json.dumps(entry) + "\n")
    with pytest.raises(Faults, match=r"train\.batch_tokens: differs from the run"):
        run(tables(train={"batch_tokens": 8}), out=tmp_path / "run", resume="latest")
    assert json.loads(history.read_text()) == entry


def test_what_fails_before_training_sets_nothing_aside(tmp_path):
    folder = tmp_path / "run"
    run(tables(), out=folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(Faults):
        run(tables(evaluate={"model_tokens": 64}), out=folder, resume="step_000004")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_what_was_just_written_is_never_pruned(tmp_path):
    folder = tmp_path / "run"
    run(tables(), out=folder)
    interrupted(folder, 6, resume="step_000004", keep_checkpoints=1, checkpoint_every=100)
    assert names(folder / "checkpoints") == ["set_aside", "step_000006"]


OURS_NOT = ["step_000200_best", "step_000003.bak", "step_best", "step_", "step_7", "step_٠٠٠٠٠٩", "notes"]


def test_names_that_are_not_ours_are_left_alone_everywhere(tmp_path):
    folder = tmp_path / "run"
    interrupted(folder, 5)
    for name in OURS_NOT:
        shutil.copytree(folder / "checkpoints/step_000004", folder / "checkpoints" / name)
    (folder / "checkpoints/step_000099").write_text("a file")
    run(tables(train={"keep_checkpoints": 1}), out=folder, resume="latest")
    assert set(names(folder / "checkpoints")) == {*OURS_NOT, "step_000099", "step_000012"}


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog, call):
    owner, real = (Path, Path.rename) if call == "rename" else (shutil, shutil.rmtree)

    def failing(path, *rest, **named):
        pruned = call == "rmtree" or ".old-0" in str(rest[0])  # else it is being written
        if pruned and "step_000004" in Path(path).name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *rest, **named)

    monkeypatch.setattr(owner, call, failing)
    run(tables(train={"steps": 12, "checkpoint_every": 4, "keep_checkpoints": 1}), out=tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step_000012").is_dir()
    assert any("step_000004" in line and "could not be removed" in line for line in caplog.messages), caplog.messages


def test_a_linked_checkpoint_and_a_linked_transcoder_are_resumed_pruned_and_saved(tmp_path):
    folder = tmp_path / "run"
    run(tables(train={"steps": 8}), out=folder)
    for name in ("checkpoints/step_000008", "transcoder"):
        (folder / name).rename(tmp_path / Path(name).name)
        (folder / name).symlink_to(tmp_path / Path(name).name)
    run(tables(train={"steps": 12, "keep_checkpoints": 1}), out=folder, resume="latest")
    assert names(folder / "checkpoints") == ["step_000012"]
    assert (tmp_path / "step_000008" / MANIFEST).is_file(), "only the link is pruned"
    assert (folder / "transcoder").is_symlink()
    saved = read_tensors(tmp_path / "transcoder/transcoder.safetensors")
    last = read_tensors(folder / "checkpoints/step_000012/transcoder.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in saved.items())


# -- signals -----------------------------------------------------------------------------------------------------------


LONG = {
    "evaluation": {"evaluate": {"tokens": 40_000_000, "model_tokens": 0}},
    "converted": {"convert": {"tokens": 40_000_000, "calibration_tokens": 40_000_000}},
}
"""Stages that would take minutes, by their folder."""


@pytest.mark.parametrize("stage", LONG)
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=lambda kind: kind.name)
def test_a_signal_after_training_ends_the_run_at_once_and_leaves_whole_files(tmp_path, kind, stage):
    process = started(tmp_path / "run", train={"steps": 2}, **LONG[stage])
    wait_for(tmp_path / "run/transcoder" / MANIFEST)
    time.sleep(0.3)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1].startswith("interrupted after training: ") and "Traceback" not in said
    assert not (tmp_path / "run" / stage).exists() and "run.lock" not in names(tmp_path / "run")


def test_a_signal_while_statistics_are_estimated_stops_at_once_and_leaves_no_folder(tmp_path):
    process = started(tmp_path / "run", train={"statistics_tokens": 400_000_000})
    wait_for(tmp_path / "run/run.lock")
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "interrupted before training: nothing is changed"
    assert not (tmp_path / "run").exists()
