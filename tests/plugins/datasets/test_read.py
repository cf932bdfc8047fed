"""Stretches of files are read as they are, past the page cache and through it."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt_datasets.format.read import DIRECT, PIECE, read_stretches
from tests.support.commands import python


@pytest.fixture
def file() -> Iterator[Path]:
    """A file on a disk: `tmp_path` may be in memory, where there is no cache to pass by."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder, "file")
        path.write_bytes(random.Random(1).randbytes(2 * PIECE + 12_345))
        yield path


def stretches(file: Path) -> list[tuple[int, np.ndarray]]:
    """Short and long ones, at any place, up to the file's last byte."""
    size, draw = file.stat().st_size, random.Random(2)
    places = [0, 1, 4095, 4096, 8192, size - 1, *(draw.randrange(size) for _ in range(20))]
    lengths = [4096, 4096, 2, 1, PIECE + 1, 1, *(draw.randrange(1, PIECE * 3 // 2) for _ in range(20))]
    return [(place, np.zeros(min(n, size - place), np.uint8)) for place, n in zip(places, lengths, strict=True)]


@pytest.mark.parametrize("page_cache", [False, True])
def test_they_are_what_the_file_has(file: Path, page_cache: bool) -> None:
    wanted, found = file.read_bytes(), stretches(file)
    read_stretches(file, found, page_cache=page_cache)
    for place, array in found:
        assert array.tobytes() == wanted[place : place + len(array)]


@pytest.mark.parametrize("page_cache", [False, True])
def test_none_reaches_beyond_the_end(file: Path, page_cache: bool) -> None:
    size = file.stat().st_size
    for place in (size - 99, size, size + 10_000):
        with pytest.raises(OSError, match="the file ends before them"):
            read_stretches(file, [(place, np.zeros(100, np.uint8))], page_cache=page_cache)


@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_file_systems_that_refuse_are_read_through_the_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    """As some network and memory file systems do: when the file is opened, or not before it is read."""
    real_open, real_read, refused = os.open, os.preadv, []

    def refuse() -> None:
        refused.append(1)
        raise OSError(errno.EINVAL, "Invalid argument")

    def fake_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if refusing == "open" and flags & DIRECT:
            refuse()
        return real_open(path, flags & ~DIRECT, *rest, **more)

    def fake_read(handle: int, buffers: Any, place: int) -> int:
        if refusing == "preadv" and not refused:
            refuse()
        return real_read(handle, buffers, place)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "preadv", fake_read)
    wanted, found = file.read_bytes(), stretches(file)
    read_stretches(file, found, page_cache=False)
    assert refused
    assert all(array.tobytes() == wanted[place : place + len(array)] for place, array in found)


@pytest.mark.parametrize("page_cache", [False, True])
def test_systems_without_advice_and_direct_reading(
    file: Path, monkeypatch: pytest.MonkeyPatch, page_cache: bool
) -> None:
    """As macOS: everything is read through the cache."""
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr("clt_datasets.format.read.DIRECT", 0)
    expected, found = file.read_bytes(), stretches(file)
    read_stretches(file, found, page_cache=page_cache)
    assert all(array.tobytes() == expected[place : place + len(array)] for place, array in found)


@pytest.mark.parametrize("page_cache", [False, True])
def test_only_the_cache_keeps_what_was_read(file: Path, page_cache: bool) -> None:
    def from_disk() -> int:
        (line,) = [x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("read_bytes")]
        return int(line.split()[1])

    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    whole, counts = [(0, np.zeros(file.stat().st_size, np.uint8))], []
    for _ in range(2):
        before = from_disk()
        read_stretches(file, whole, page_cache=page_cache)
        counts.append(from_disk() - before)
    if not counts[0]:
        pytest.skip("this file system keeps files in memory")
    assert counts[0] >= file.stat().st_size
    assert counts[1] == 0 if page_cache else counts[1] >= file.stat().st_size


FORKED = """
import os, sys
from pathlib import Path
import numpy as np
from clt_datasets.format.read import read_stretches

read_stretches(Path(sys.argv[1]), [(0, np.zeros(10, np.uint8))], page_cache=False)  # this thread's buffer is there
child = os.fork() == 0
wrong = 0
for _ in range(100):
    read = np.zeros(2**16, np.uint8)
    read_stretches(Path(sys.argv[1 + child]), [(0, read)], page_cache=False)
    wrong += bool((read != child).any())
if child:
    os._exit(wrong > 0)
sys.exit(wrong > 0 or os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_forked_processes_read_side_by_side(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("zeros", "ones")]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 2**16)
    done = python("-c", FORKED, *files)
    assert done.returncode == 0, done.stderr
