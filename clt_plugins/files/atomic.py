"""Single files that are written atomically, and the steps that atomic writing is made of: flush, exchange, remove."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_umask = os.umask(0o022)  # the mask can be read only by setting it
os.umask(_umask)
FILE_MODE = 0o666 & ~_umask
"""What files may be read and written by, as the user's umask says."""

_NO_FOLDER_SYNC = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR, errno.ENOSYS}
"""Errors of systems that cannot open or flush a folder: Windows, some network and user-space file systems."""

_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EPERM}
"""Errors of file systems that cannot exchange two names: NFS, FUSE, old kernels."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a crash or a full disk it has the new content, or the old one. Text is UTF-8.

    Raises:
        OSError: it could not be written; names the file. What was there is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        remove(partial)
        raise OSError(f"{path}: could not be written: {reason(error)}") from error
    except BaseException:
        remove(partial)
        raise


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk.

    Where the system cannot do this for folders, it is left out: it then keeps names by means of its own.

    Raises:
        OSError: the disk is full or failed.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, in one step; False where the system cannot, and nothing happened (Linux's
    `renameat2`; not macOS, not NFS).

    Raises:
        OSError: it failed, and nothing happened; names both.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link (not what it leads to).

    What cannot be removed stays, with a warning that names it: it takes room, but nothing is wrong with the run.
    """
    try:
        if path.is_symlink():
            target = path.resolve()
            path.unlink()
            logger.warning("%s: only the link is removed; what it leads to stays: %s", path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: could not be removed: %s", path, reason(error))


def reason(error: OSError) -> str:
    """What went wrong, without the path, which the caller names."""
    return error.strerror or str(error)
