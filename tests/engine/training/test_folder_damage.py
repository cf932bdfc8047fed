"""The folder of a run after damage or a kill at any moment: what is broken is named, and the run goes on."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clt_plugins import run
from clt_plugins.errors import ExitCode, Faults, Stopped
from clt_plugins.files.folders import MANIFEST, read_tensors
from clt_plugins.training.saved import verify
from tests.support.helpers import tables

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


class OneOfTwo:
    """A rank of two, each in a thread."""

    world = 2

    def __init__(self, rank: int, barrier: threading.Barrier, sent: dict[int, str]):
        self.rank, self.barrier, self.sent = rank, barrier, sent

    def gather(self, text: str) -> list[str]:
        self.barrier.wait(60)
        self.sent[self.rank] = text
        self.barrier.wait(60)
        return [self.sent[rank] for rank in range(2)]


def test_a_rank_ends_after_all_have_looked_for_an_earlier_checkpoint(tmp_path, finished, monkeypatch):
    """A rank that ended while rank 0 still looked had rank 0 killed by `torchrun`, and nobody read what was damaged."""
    shutil.copytree(finished, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_000012"
    (newest / "transcoder.safetensors").write_bytes(b"damaged")
    looked: list[tuple[int, str]] = []
    check = verify.check_folder

    def recorded(folder: Path, needs: Sequence[str], parallel: OneOfTwo) -> None:
        looked.append((parallel.rank, folder.name))
        check(folder, needs, parallel)

    monkeypatch.setattr(verify, "check_folder", recorded)
    barrier, sent = threading.Barrier(2), {}
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(verify.verify_checkpoint, newest, OneOfTwo(rank, barrier, sent)) for rank in range(2)]
    told, silent = (rank.exception() for rank in ranks)
    assert isinstance(told, Faults) and "truncated" in str(told) and str(told).endswith("--resume step_000008")
    assert isinstance(silent, Stopped) and str(silent) == "" and silent.code == ExitCode.USAGE
    assert sorted(looked) == [(rank, f"step_{step:06}") for rank in range(2) for step in (8, 12)]


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
