"""`generate` and `scramble` when the disk fails, when files cannot be read, and when somebody else is at work."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import clt_datasets.format.files as files
from clt_datasets.make.inspect import inspect
from clt_datasets.make.scramble import scramble
from clt_plugins import DamagedError, Lock, Refused
from tests.support.stored_data import SMALL, content, generated, write_numbered

SLOW = pytest.mark.slow


class Failing:
    """The n-th of all calls that change something on the disk fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.left, self.later = 0, False

    @contextmanager
    def at(self, number: int, *, later: bool) -> Iterator[None]:
        """
        Args:
            later: whether all later calls fail too, as on a full disk.
        """
        self.left, self.later = number, later
        with self.monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (files, "write_all")):
                patch.setattr(owner, name, self._wrapped(getattr(owner, name)))
            yield

    @property
    def failed(self) -> bool:
        return self.left <= 0

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 or (self.later and self.left < 0):
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return replacement


@contextmanager
def names(folder: Path) -> Iterator[None]:
    """An error of the system is one line that names a file in a folder."""
    try:
        yield
    except OSError as error:
        text = str(error)
    else:
        return
    assert str(folder) in text and "\n" not in text


@pytest.mark.parametrize(
    ("begun", "later"),
    [(False, False), (True, True), pytest.param(True, False, marks=SLOW), pytest.param(False, True, marks=SLOW)],
)
def test_whatever_call_fails_generate_publishes_nothing_damaged_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, later: bool
) -> None:
    generated(tmp_path / "unbroken", **SMALL)
    unbroken = content(tmp_path / "unbroken")
    failing = Failing(monkeypatch)
    for number in count(1):
        out = tmp_path / f"broken_{number}"
        if begun:
            generated(out, **SMALL)
            for name in ("manifest.json", "statistics.safetensors", "train_00001.h5"):
                (out / name).unlink()
        with failing.at(number, later=later), names(out):
            generated(out, **SMALL)
        if not failing.failed:
            break
        assert later or not list(out.glob(".*.h5.partial")), "nothing half written is left"
        if (out / "manifest.json").exists():
            assert content(out) == unbroken
        generated(out, **SMALL)
        assert content(out) == unbroken
        assert not list(out.glob(".*.partial"))
    assert number > (12 if begun else 25)


def test_data_are_generated_where_the_system_cannot_flush_folders(tmp_path: Path, monkeypatch: Any) -> None:
    """Windows, and some file systems, cannot open a folder."""
    generated(tmp_path / "usual", **SMALL)
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", opened)
    generated(tmp_path / "other", **SMALL)
    scramble(tmp_path / "other", tmp_path / "scrambled", 1, memory=20_000)
    assert content(tmp_path / "other") == content(tmp_path / "usual")
    assert (tmp_path / "scrambled/manifest.json").is_file()


@pytest.mark.parametrize("later", [False, pytest.param(True, marks=SLOW)])
def test_whatever_call_fails_scramble_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    write_numbered(tmp_path / "data", [70, 30])
    scramble(tmp_path / "data", tmp_path / "unbroken", 1, memory=20_000)
    unbroken = content(tmp_path / "unbroken")
    failing = Failing(monkeypatch)
    for number in count(1):
        out = tmp_path / "broken" / str(number)
        with failing.at(number, later=later), names(out.parent):
            scramble(tmp_path / "data", out, 1, memory=20_000)
        if not failing.failed:
            break
        if not out.exists():
            scramble(tmp_path / "data", out, 1, memory=20_000)
        assert content(out) == unbroken
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert number > 20


def test_only_one_process_writes(tmp_path: Path) -> None:
    generated(tmp_path / "data", **SMALL)
    for path, work in (
        (tmp_path / "data" / ".generate_0.lock", lambda: generated(tmp_path / "data", **SMALL)),
        (tmp_path / ".out.lock", lambda: scramble(tmp_path / "data", tmp_path / "out", 0, memory=10**7)),
    ):
        lock = Lock(path)
        assert lock.try_acquire() is None
        with pytest.raises(Refused, match=r"another `\w+` writes .*process \d+ on .*: wait until it has ended"):
            work()
        lock.release()
        work()
    assert not list(tmp_path.glob("**/*.lock"))


def test_a_chunk_that_cannot_be_read_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason to say that another process still writes: there is none."""

    def broken(path: Path) -> Any:
        raise DamagedError(f"{path}: cannot be read")

    monkeypatch.setattr("clt_datasets.make.generate.read_summary", broken)
    with pytest.raises(DamagedError, match=r"train_00000\.h5: cannot be read"):
        generated(tmp_path / "data", **SMALL)
    monkeypatch.undo()
    generated(tmp_path / "data", **SMALL)
    assert inspect(tmp_path / "data", verify=True).faults == []


def test_a_pipe_in_the_place_of_a_chunk_is_not_waited_for(tmp_path: Path) -> None:
    generated(out := tmp_path / "data", **SMALL)
    (chunk,) = out.glob("held_out_*.h5")
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(DamagedError, match=r"held_out_00000\.h5: missing, or not a file"):
        scramble(out, tmp_path / "out", 0, memory=10**7)


def test_scramble_publishes_no_damaged_held_out_rows(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [70], d_model=64)
    path = tmp_path / "data" / "held_out_00000.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"held_out_00000\.h5: chunk 1, rows \d+ to \d+: damaged"):
        scramble(tmp_path / "data", tmp_path / "out", 0, memory=10**7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_scramble_needs_few_open_files(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [2000])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(2) for _ in range(10)]  # the ten lowest numbers: they need not follow on each other
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        # Some forty buckets.
        scramble(tmp_path / "data", tmp_path / "out", 0, memory=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert inspect(tmp_path / "out", verify=True).faults == []
