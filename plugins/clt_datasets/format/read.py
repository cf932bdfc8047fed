"""Stretches of a file, read into memory: past the page cache, or through it.

A data set is read from end to end once per epoch. Past the cache that costs a copy less, runs at the disk's own rate
whatever else the memory is full of, and leaves in the cache what other programs want there. The kernel then takes
places, lengths and addresses in multiples of a sector only, so what is wanted is read with its surroundings into memory
of the thread, and copied from there.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np

SECTOR = 4096
"""A multiple of every disk's sector."""
PIECE = 4 * 2**20
"""Bytes read at a time past the cache."""
DIRECT = getattr(os, "O_DIRECT", 0)
"""0 on systems without it; then everything is read through the cache."""


class Room(threading.local):
    """Memory of each thread that begins at a multiple of `SECTOR`; it goes when the thread ends."""

    def __init__(self) -> None:
        self.bytes = np.frombuffer(mmap.mmap(-1, PIECE), np.uint8)


_room = Room()


def read_stretches(path: Path, stretches: list[tuple[int, np.ndarray]], *, page_cache: bool) -> None:
    """Read stretches of a file.

    Args:
        stretches: where each begins in the file, and the contiguous array that it fills.
        page_cache: through it; otherwise past it, where the file system can.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    if page_cache or not DIRECT or not _read_direct(path, stretches):
        _read_cached(path, stretches)


def _read_direct(path: Path, stretches: list[tuple[int, np.ndarray]]) -> bool:
    """False where the file system refuses; nothing is lost then but time."""
    try:
        handle = os.open(path, os.O_RDONLY | DIRECT)
        try:
            for place, array in stretches:
                left = _bytes(array)
                while len(left):
                    count = _piece(handle, place, left)
                    left, place = left[count:], place + count
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _piece(handle: int, place: int, into: np.ndarray) -> int:
    """Read the next bytes; returns how many."""
    before = place % SECTOR
    wanted = min(before + len(into), PIECE)
    got = os.preadv(handle, [_room.bytes[: -(-wanted // SECTOR) * SECTOR].data], place - before)
    count = min(got, wanted) - before
    if count <= 0:
        raise OSError("the file ends before them")
    # By NumPy, which lets other threads go on meanwhile.
    into[:count] = _room.bytes[before : before + count]
    return count


def _read_cached(path: Path, stretches: list[tuple[int, np.ndarray]]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        for place, array in stretches:
            # The whole stretch is asked for at once, instead of a read-ahead window at a time.
            os.posix_fadvise(handle, place, array.nbytes, os.POSIX_FADV_WILLNEED)
        for place, array in stretches:
            left = _bytes(array)
            while len(left):
                count = os.preadv(handle, [left.data], place)
                if not count:
                    raise OSError("the file ends before them")
                left, place = left[count:], place + count
    finally:
        os.close(handle)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
