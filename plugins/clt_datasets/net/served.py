"""Data sets as the server opens them: regular files below its root, through no link."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from clt_datasets.format.folder import ChunkReader, LocalData
from clt_datasets.format.manifest import MANIFEST, STATISTICS, Manifest
from clt_datasets.net.limits import LARGEST_MANIFEST
from clt_plugins import DamagedError


class NotServed(Exception):
    """A link, a FIFO or a device where a data set's file should be."""


def regular(path: Path) -> os.stat_result:
    """The state of a regular file that is no link.

    Raises:
        FileNotFoundError: there is none.
        NotServed: it is something else.
    """
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        raise NotServed(f"{path.parent.name}/{path.name} is not a regular file: it is not served")
    return state


def read_regular(path: Path, largest: int) -> bytes:
    """The content of a regular file that is no link.

    Raises:
        FileNotFoundError: there is none.
        NotServed: it is something else.
        DamagedError: it has more than `largest` bytes.
    """
    regular(path)
    # It may be another file by now: a link is not followed then, and a FIFO not waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotServed(f"{path.parent.name}/{path.name} is not a regular file: it is not served")
        data = file.read(largest + 1)
    if len(data) > largest:
        raise DamagedError(f"{path}: more than {largest} bytes")
    return data


class ServedData(LocalData):
    """A data set below the server's root.

    Args:
        path: its folder.
        page_cache: whether uncompressed rows are read through the page cache.

    Raises:
        FileNotFoundError, NotServed: it has no manifest.
        Refused, DamagedError: its manifest is damaged.
    """

    def __init__(self, path: Path, *, page_cache: bool):
        raw = read_regular(path / MANIFEST, LARGEST_MANIFEST)
        self.path, self.page_cache = path, page_cache
        self.manifest = Manifest.from_json(raw, str(path / MANIFEST))
        self.bytes = len(raw)
        """Of the manifest."""
        self._readers: dict[int, ChunkReader] = {}
        self._lock = threading.Lock()

    def chunk(self, number: int) -> ChunkReader:
        """See `LocalData.chunk`."""
        self._no_link(self.manifest.chunks[number].file)
        return super().chunk(number)

    def statistics(self) -> bytes:
        """See `LocalData.statistics`."""
        self._no_link(STATISTICS)
        return super().statistics()

    def _no_link(self, file: str) -> None:
        """Checked each time before a file is opened."""
        try:
            regular(self.path / file)
        except FileNotFoundError:
            raise DamagedError(f"{self.path / file}: missing") from None
