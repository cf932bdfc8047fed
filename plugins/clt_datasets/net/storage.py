"""Where uploads are kept: partial files, room for them, and how a file becomes visible and durable."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

from clt_datasets.format.files import sync
from clt_datasets.format.manifest import CHUNK_NAME, MANIFEST, STATISTICS
from clt_datasets.net.answers import BadRequest

PARTIAL = re.compile(rf"\.({CHUNK_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(STATISTICS)})\.[0-9a-f]{{32}}\.upload")
"""Names of unfinished uploads. Other files are never deleted."""
LEAST = 2**12
"""Bytes that each file counts at least, so that many empty ones use up a quota too."""
KEPT_FREE = 0.05
"""The share of the disk that uploads leave free."""
KEPT_FREE_AT_MOST = 10 * 2**30
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A link is not followed, a FIFO not waited for."""
COUNTED_S = 30.0
"""The files below the root are counted again after so long."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Storage:
    """The folder of a server's data sets, as far as uploads change it. Used by several threads at a time.

    Args:
        root: the folder.
        quota: bytes that its files may have; None leaves a share of the disk free.
        partial_s: an unfinished upload that was not continued for so long is deleted.
    """

    def __init__(self, root: Path, quota: int | None, partial_s: float):
        self.root, self.quota, self.partial_s = root, quota, partial_s
        self._lock = threading.Lock()
        self._promised: dict[Path, int] = {}
        """Bytes that uploads under way still need, by partial file."""
        self._used = 0
        self._counted: float | None = None

    def partial(self, path: Path, checksum: str) -> Path:
        """Where a file is while it is uploaded."""
        return path.with_name(f".{path.name}.{checksum}.upload")

    def check(self, size: int) -> None:
        """Whether there is room for so many bytes.

        Raises:
            BadRequest: 507, there is not.
        """
        with self._lock:
            self._check(size)

    def begin(self, partial: Path, rest: int) -> int:
        """Make room for the rest of an upload; the folder is made if it is missing.

        Returns:
            A descriptor to append to the file.

        Raises:
            BadRequest: there is no room.
        """
        with self._lock:
            self._check(rest)
            self._promised[partial] = rest
            # Too much for one that is continued; put right when the files are counted again.
            self._used += LEAST
        try:
            folder = partial.parent
            for other in folder.glob(f"{partial.name[:-39]}*.upload"):
                # Another content for the same name, given up by its client: only one is kept for each name.
                if other != partial and PARTIAL.fullmatch(other.name):
                    self._delete(other)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK
            for last in (False, True):
                if not folder.is_dir():
                    if folder.exists():
                        raise BadRequest(409, "a file of the data set's name is there")
                    folder.mkdir(exist_ok=True)
                    sync(self.root)
                try:
                    handle = os.open(partial, flags, 0o666)
                    break
                except FileNotFoundError:
                    # Another upload failed meanwhile, and removed the empty folder.
                    if last:
                        raise
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise BadRequest(409, "a file of this name is there that is not a regular one")
            return handle
        except BaseException:
            self.end(partial)
            raise

    def write(self, handle: int, partial: Path, piece: bytes) -> None:
        """Append bytes.

        Raises:
            BadRequest: the disk is full; the upload is deleted, so that others have room.
        """
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError as error:
            if error.errno in FULL:
                self.discard(partial)
                raise BadRequest(507, "the server's disk is full") from error
            raise
        with self._lock:
            self._used += len(piece)
            if partial in self._promised:
                self._promised[partial] -= len(piece)

    def end(self, partial: Path) -> None:
        """No upload to this file is under way any more."""
        with self._lock:
            self._promised.pop(partial, None)

    def publish(self, partial: Path, path: Path) -> None:
        """Give a complete file its name. It is on the disk when this returns.

        Raises:
            OSError: it is not sure to be on the disk; the upload is deleted.
            BadRequest: the disk is full.
        """
        try:
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        except OSError as error:
            # After a failed fsync the system may have dropped what it could not write.
            self.discard(partial)
            if error.errno in FULL:
                raise BadRequest(507, "the server's disk is full") from error
            raise

    def discard(self, partial: Path) -> None:
        """Delete an upload, and its folder if nothing else is in it."""
        self._delete(partial)
        with suppress(OSError):
            partial.parent.rmdir()

    def tidy(self) -> None:
        """Delete unfinished uploads that nobody has continued for long."""
        before = time.time() - self.partial_s
        for path, state in self._files():
            if state.st_mtime < before and PARTIAL.fullmatch(path.name) and path not in self._promised:
                self.discard(path)

    def _check(self, size: int) -> None:
        needed = max(size, LEAST) + sum(self._promised.values())
        if self.quota is not None:
            now = time.monotonic()
            if self._counted is None or now - self._counted > COUNTED_S or self._used + needed > self.quota:
                self._used = sum(max(state.st_size, LEAST) for _, state in self._files())
                self._counted = now
            if self._used + needed > self.quota:
                raise BadRequest(507, f"the server's quota of {self.quota // 2**20} MB is used up")
        disk = shutil.disk_usage(self.root)
        kept = min(int(disk.total * KEPT_FREE), KEPT_FREE_AT_MOST)
        if disk.free - needed < kept:
            raise BadRequest(507, "the server's disk is full, but for the part that uploads leave free")

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The files of all data sets; links are not followed."""
        files = []
        for folder in os.scandir(self.root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):  # removed meanwhile
                for each in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        state = each.stat(follow_symlinks=False)
                        if stat.S_ISREG(state.st_mode):
                            files.append((Path(each.path), state))
        return files

    def _delete(self, partial: Path) -> None:
        with suppress(FileNotFoundError):
            partial.unlink()
        with self._lock:
            self._counted = None
