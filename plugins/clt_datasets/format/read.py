"""Reads stretches of a file into memory, past the page cache or through it.

A data set is read from end to end once per epoch. Past the cache this costs one copy less, runs at the disk's own rate
whatever else fills the memory, and leaves in the cache what other programs need there. The kernel then accepts only
offsets, lengths and addresses that are multiples of a sector. So each stretch is read with its surroundings into a
buffer of the thread, and copied from there.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

SECTOR = 4096
"""A multiple of every disk's sector."""
PIECE = 4 * 2**20
"""Bytes read at a time past the cache."""
DIRECT = getattr(os, "O_DIRECT", 0)
"""0 on systems without it, such as macOS; then everything is read through the cache."""


class _Aligned(threading.local):
    """A buffer of each thread that begins at a multiple of `SECTOR`; freed when the thread ends.

    NumPy's memory is private to a process. That of `mmap` would be one memory for all processes that are forked.
    """

    def __init__(self) -> None:
        memory = np.empty(PIECE + SECTOR, np.uint8)
        begin = -memory.ctypes.data % SECTOR
        self.bytes = memory[begin : begin + PIECE]


_aligned = _Aligned()


def read_stretches(path: Path, stretches: list[tuple[int, np.ndarray]], *, page_cache: bool) -> None:
    """Read stretches of a file.

    Args:
        stretches: the offset in the file at which each begins, and the contiguous array that it fills.
        page_cache: read through it; otherwise past it, where the file system can.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    if DIRECT and not page_cache:
        try:
            _read_direct(path, stretches)
            return
        except OSError as error:
            # The file system cannot read past the cache; some say so only at the first read.
            if error.errno != errno.EINVAL:
                raise
    _read_cached(path, stretches)


def _read_direct(path: Path, stretches: list[tuple[int, np.ndarray]]) -> None:
    handle = os.open(path, os.O_RDONLY | DIRECT)
    try:
        for offset, array in stretches:
            rest = _bytes(array)
            while len(rest):
                count = _read_piece(handle, offset, rest)
                rest, offset = rest[count:], offset + count
    finally:
        os.close(handle)


def _read_piece(handle: int, offset: int, into: np.ndarray) -> int:
    """Read the next bytes past the cache; returns how many."""
    before = offset % SECTOR
    needed = min(before + len(into), PIECE)
    received = os.preadv(handle, [_aligned.bytes[: -(-needed // SECTOR) * SECTOR].data], offset - before)
    count = min(received, needed) - before
    if count <= 0:
        raise OSError("the file ends before them")
    # NumPy copies without the interpreter's lock, so other threads continue meanwhile.
    into[:count] = _aligned.bytes[before : before + count]
    return count


def _read_cached(path: Path, stretches: list[tuple[int, np.ndarray]]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for offset, array in stretches:
                # Ask for the whole stretch at once, instead of one read-ahead window after the other.
                os.posix_fadvise(handle, offset, array.nbytes, os.POSIX_FADV_WILLNEED)
        for offset, array in stretches:
            rest = _bytes(array)
            while len(rest):
                count = os.preadv(handle, [rest.data], offset)
                if not count:
                    raise OSError("the file ends before them")
                rest, offset = rest[count:], offset + count
    finally:
        os.close(handle)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
