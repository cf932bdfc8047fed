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


# -- damage ------------------------------------------------------------------------------------------------------------

MANIFESTS = {
    "a list": "[]",
    "a number": "3",
    "empty": "",
    "no files": '{"format": 1, "files": {}}',
    "deep": '{"format": 1, "files": ' + "[" * 200_000,
    "a changed key": None,
    "a name no file can have": '{"format": 1, "files": {"' + "x" * 5000 + '": {"bytes": 1, "sha256": ""}}}',
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_a_damaged_checkpoint_and_the_one_before_is_offered(tmp_path_factory, damage, finished):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished, folder)
    manifest = folder / "checkpoints/step_000012" / MANIFEST
    text = MANIFESTS[damage]
    manifest.write_text(manifest.read_text().replace("sha256", "shc256", 1) if text is None else text)
    with pytest.raises(Faults, match=r"step_000012[\s\S]*--resume step_000008") as error:
        run(tables(), out=folder, resume="latest")
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tables(), out=folder)
    return folder


def test_a_damaged_recipe_toml_is_named_and_written_anew_from_the_checkpoint(tmp_path, finished, caplog):
    shutil.copytree(finished, tmp_path / "run")
    for text in ("x", ""):
        (tmp_path / "run/recipe.toml").write_text(text)
        run(tables(), out=tmp_path / "run", resume="latest")
        assert (tmp_path / "run/recipe.toml").read_text() == (finished / "recipe.toml").read_text()
    assert "run/recipe.toml: cannot be read, and is written anew" in caplog.text


def test_a_recipe_toml_without_an_end_is_not_read(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/recipe.toml").unlink()
    (tmp_path / "run/recipe.toml").symlink_to("/dev/zero")
    run(tables(), out=tmp_path / "run", resume="latest")
    assert (tmp_path / "run/recipe.toml").read_text() == (finished / "recipe.toml").read_text()


# -- every moment ------------------------------------------------------------------------------------------------------

CALLS = [(os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"), (os, "fsync"), (os, "open")]
CALLS += [(os, "ftruncate"), (os, "write")]


class KilledError(BaseException):
    """The process is dead: nothing that it would do later happens."""


class Killer:
    """Lets a process die before its n-th call that changes the disk; all its later calls change nothing either."""

    def __init__(self, monkeypatch, at: int):
        self.count, self.at = 0, at
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name), name))

    def _wrapped(self, real, name):
        def call(*args, **kwargs):
            reading = name == "open" and not (args[1] if len(args) > 1 else 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if reading:
                return real(*args, **kwargs)
            self.count += 1
            if self.count >= self.at:
                raise KilledError(name)
            return real(*args, **kwargs)

        return call


def killed(at: int, folder: Path, **arguments) -> bool:
    """A run that dies at a call; whether it lived to that call."""
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, at)
        try:
            run(tables(train={"keep_checkpoints": 2}), out=folder, **arguments)
        except BaseException as error:
            if killer.count < at:
                raise AssertionError("it failed before it was killed") from error
        return killer.count >= at


@pytest.fixture
def forget_locks(monkeypatch):
    """A dead process has no locks; this one lives on."""
    from clt_plugins.files import locks

    def forget() -> None:
        locks._held.clear()

    return forget


@pytest.mark.parametrize("first", [1, pytest.param(0, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("what", ["run", "resume", "back"])
def test_killed_at_any_call_that_changes_the_disk_it_starts_or_resumes_to_the_same_end(
    tmp_path, finished, what, first, forget_locks
):
    end = read_tensors(finished / "transcoder/transcoder.safetensors")
    at = 1
    while True:
        folder = tmp_path / f"{what}-{at}"
        if what != "run":
            shutil.copytree(finished, folder)
            (folder / "checkpoints/step_000012").rename(tmp_path / f"{at}") if what == "resume" else None
        resume = {"run": None, "resume": "latest", "back": "step_000004"}[what]
        lived = killed(at, folder, resume=resume)
        forget_locks()
        begun = (folder / "metrics.jsonl").exists() or what != "run"
        if begun and what == "run":
            with pytest.raises(Faults, match="already there: go on with --resume"):
                run(tables(), out=folder)
        run(tables(), out=folder, resume="latest" if begun else None)
        saved = read_tensors(folder / "transcoder/transcoder.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in end.items()), at
        litter = [path.name for path in folder.rglob(".*")]
        assert not litter, (at, litter)
        shutil.rmtree(folder)
        if not lived:
            break
        at += 1 if not first else 13


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
