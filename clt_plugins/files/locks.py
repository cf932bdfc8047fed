"""Locks of one process against others, on this machine or on others that share the file system.

The lock is the system's, on a file that says who holds it. It ends with its process, however that ends; the file may
stay, and then means nothing. POSIX locks also work over NFS, which `flock` and a mere file do not.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs

from clt_plugins.files.atomic import FILE_MODE, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_FAR = 2**30
"""On Windows a locked byte cannot be read by others: one far behind the text."""
_POLL_S = 0.05

_threads = threading.Lock()
_held: set[Path] = set()
"""Files that this process has locked. A second lock of a process would succeed; and closing a second handle to the file
would end the first one."""


@attrs.frozen
class Holder:
    """Who holds a lock."""

    host: str
    process: int
    since: str
    """Local time of the start."""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}" if self.process else "another process"


class Lock:
    """A lock by means of a file.

    Args:
        path: the file; it is made, and removed again by `release`.
    """

    def __init__(self, path: Path):
        self.path = path.parent.resolve() / path.name
        self._handle: int | None = None

    def try_acquire(self) -> Holder | None:
        """Take the lock; returns who holds it, if another process does.

        Where the file system has no locks, a warning says so, and the lock counts as taken.

        Raises:
            OSError: the file cannot be made; names it.
        """
        with _threads:
            if self.path in _held:
                return Holder(socket.gethostname(), os.getpid(), _now())
            return self._try()

    def _try(self) -> Holder | None:
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, FILE_MODE)
            except OSError as error:
                raise OSError(f"{self.path}: could not be made: {reason(error)}") from error
            try:
                holder = self._lock(handle)
                # Between opening and locking, the last holder may have removed the file: then it is locked for nobody.
                current = holder is None and self._is(handle)
                if current:
                    self._sign(handle)
                    _held.add(self.path)
                    self._handle = handle
            except BaseException:
                os.close(handle)
                raise
            if current:
                return None
            os.close(handle)
            if holder is not None:
                return holder

    @property
    def taken(self) -> bool:
        """Whether this object has the lock."""
        return self._handle is not None

    def acquire(self) -> None:
        """Wait until the lock is free, and take it.

        Raises:
            OSError: see `try_acquire`.
        """
        told = False
        while (holder := self.try_acquire()) is not None:
            if not told:
                logger.warning("%s: waiting for %s", self.path, holder)
                told = True
            time.sleep(_POLL_S)

    def holder(self) -> Holder | None:
        """Who holds it now, this process too; None if nobody does. It is not taken, and no file is made.

        Raises:
            OSError: the file cannot be read; names it.
        """
        with _threads:
            if self.path in _held:
                return Holder(socket.gethostname(), os.getpid(), _now())
            try:
                # O_NONBLOCK: if it is a FIFO, opening it would wait for its writer.
                handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            except FileNotFoundError:
                return None
            try:
                held = stat.S_ISREG(os.fstat(handle).st_mode) and _is_locked(handle)
                return _read(handle) if held else None
            finally:
                os.close(handle)

    def release(self) -> None:
        """Give the lock back, and remove the file."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        # Removed while it is locked: afterwards it could be another process's.
        with suppress(OSError):
            if self._is(handle):
                self.path.unlink()
        with suppress(OSError):
            os.close(handle)
        _held.discard(self.path)
        if msvcrt is not None:
            with suppress(OSError):  # an open file cannot be removed there
                self.path.unlink()

    def _lock(self, handle: int) -> Holder | None:
        try:
            if fcntl is not None:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt is not None:
                os.lseek(handle, _FAR, os.SEEK_SET)
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                _warn(self.path, "this system has no locks")
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                _warn(self.path, reason(error))
            elif error.errno in _BUSY:
                return _read(handle)
            else:
                raise OSError(f"{self.path}: could not be locked: {reason(error)}") from error
        return None

    def _is(self, handle: int) -> bool:
        """Whether the file has still this name."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def _sign(self, handle: int) -> None:
        """Say who holds it; the lock holds without, so a full disk is no reason to fail."""
        mine = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(mine).encode() + b"\n")


def _is_locked(handle: int) -> bool:
    """Whether another process has locked a file; False where the file system has no locks."""
    if fcntl is None:
        return msvcrt is not None and not _passes(lambda: _try_byte(handle))
    if sys.platform == "linux":
        # Asks without taking it even for a moment, in which its owner would be turned away.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            return struct.unpack("hhqqi4x", fcntl.fcntl(handle, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    return not _passes(lambda: fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB))  # closing it gives it back


def _try_byte(handle: int) -> None:
    for how in (msvcrt.LK_NBLCK, msvcrt.LK_UNLCK):  # type: ignore[attr-defined]
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, how, 1)  # type: ignore[attr-defined]


def _passes(lock: Callable[[], None]) -> bool:
    try:
        lock()
    except OSError as error:
        return error.errno not in _BUSY
    return True


def _read(handle: int) -> Holder:
    """The holder that a lock's file names; unnamed if it has not signed yet."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        signed = json.loads(os.read(handle, 1000))
        return Holder(str(signed["host"]), int(signed["process"]), str(signed["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder("", 0, "")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


_warned: set[Path] = set()


def _warn(path: Path, why: str) -> None:
    if path.parent not in _warned:
        _warned.add(path.parent)
        logger.warning(
            "%s: locks do not work here (%s): see to it yourself that no second process writes there", path.parent, why
        )
