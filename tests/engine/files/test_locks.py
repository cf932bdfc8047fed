"""Locks: one process at a time, and none that a dead process leaves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clt_plugins.files import locks
from clt_plugins.files.folders import atomic_folder, check_folder
from clt_plugins.files.locks import Lock
from tests.support.commands import python, start

HOLD = """
import sys
from pathlib import Path
from clt_plugins.files.locks import Lock
print(Lock(Path(sys.argv[1])).try_acquire(), flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    process = start("-c", HOLD, path, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    return process


def test_a_second_process_is_told_who_has_the_lock_and_a_killed_one_leaves_none(tmp_path):
    with holder(tmp_path / "lock") as other:
        who = Lock(tmp_path / "lock").try_acquire()
        assert who is not None and (who.process, who.host) == (other.pid, os.uname().nodename)
        other.kill()
        other.wait()
    assert (tmp_path / "lock").exists(), "the file stays, and means nothing"
    mine = Lock(tmp_path / "lock")
    assert mine.try_acquire() is None
    mine.release()
    assert not (tmp_path / "lock").exists()


def test_a_process_has_a_lock_once_and_looking_does_not_end_it(tmp_path):
    mine = Lock(tmp_path / "lock")
    assert mine.try_acquire() is None
    who = Lock(tmp_path / "lock").try_acquire()
    assert who is not None and who.process == os.getpid()
    # Had the second look opened and closed the file, the first lock would be gone, as POSIX has it.
    assert str(os.getpid()) in python("-c", HOLD, tmp_path / "lock").stdout
    mine.release()


@pytest.mark.parametrize("asks", [True, False], ids=["asks", "tries"])
def test_looking_who_holds_a_lock_takes_none_and_makes_no_file(tmp_path, monkeypatch, asks):
    if not asks:
        monkeypatch.setattr(sys, "platform", "another")
    path = tmp_path / "lock"
    assert Lock(path).holder() is None and not path.exists()
    with holder(path) as other:
        who = Lock(path).holder()
        assert who is not None and who.process == other.pid
        assert Lock(path).try_acquire() is not None, "it is still the other's"
        other.kill()
        other.wait()
    assert path.exists() and Lock(path).holder() is None
    mine = Lock(path)
    mine.try_acquire()
    who = Lock(path).holder()
    assert who is not None and who.process == os.getpid()
    assert str(os.getpid()) in python("-c", HOLD, path).stdout, "looking has not ended it"
    mine.release()
    os.mkfifo(path)
    assert Lock(path).holder() is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_where_the_file_system_has_no_locks_one_line_says_so(tmp_path, monkeypatch, caplog, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    for name in ("one", "two"):
        assert Lock(tmp_path / name).try_acquire() is None
    assert len(caplog.records) == 1 and "locks do not work here" in caplog.text


def test_a_writer_that_stops_waiting_leaves_what_the_other_one_writes(tmp_path):
    """Ctrl-C removed the folder under the process that was writing it."""
    script = f"""
import signal
from pathlib import Path
from clt_plugins.files.folders import atomic_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
with atomic_folder(Path({str(tmp_path / "f")!r})):
    raise SystemExit("it did not wait")
"""
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("first")
        second = start("-c", script)
        assert second.stderr is not None
        assert "waiting for process" in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=60) != 0
    check_folder(tmp_path / "f")
    assert (tmp_path / "f" / "a").read_text() == "first"


def test_two_writers_of_one_folder_wait_for_each_other(tmp_path):
    """The second waits while the first lives; then it clears what the first left."""
    with holder(tmp_path / ".f.lock") as other:
        (tmp_path / ".f.partial").mkdir()
        assert other.stdin is not None
        script = f"""
from pathlib import Path
from clt_plugins.files.folders import atomic_folder
with atomic_folder(Path({str(tmp_path / "f")!r})) as partial:
    (partial / "a").write_text("second")
"""
        second = start("-c", script)
        assert second.stderr is not None
        assert f"waiting for process {other.pid}" in second.stderr.readline()
        assert not (tmp_path / "f").exists()
        other.kill()
        assert second.wait(timeout=60) == 0
    check_folder(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    with atomic_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("third")
