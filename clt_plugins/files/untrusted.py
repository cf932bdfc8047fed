"""Files that may come from anybody: only regular files are opened, and no size is accepted before it is checked.

A FIFO would block the reader for ever, a device may have no end, and a JSON file of a few kilobytes may be nested so
deep that it ends the interpreter's stack.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from clt_plugins.errors import Refused

SMALL = 2**26
"""Bytes of the largest JSON file that is read."""

PASSING = frozenset(
    getattr(errno, f"E{name}")
    for name in ("ACCES", "PERM", "MFILE", "NFILE", "NOMEM", "AGAIN", "INTR", "BUSY", "NOLCK", "TIMEDOUT")
)
"""Errors that say nothing of a file's content."""


def passing(error: BaseException, path: Path) -> OSError | None:
    """The same error in one line that names the file, if it says nothing of the file's content; None for all others.

    No permission, no descriptors, no memory, a lock, a slow server: what is read later may be whole. Libraries such as
    HDF5 raise them as all else that goes wrong with a file, which is damage.
    """
    number = error.errno if isinstance(error, OSError) else None
    return OSError(number, os.strerror(number), str(path)) if number in PASSING and number is not None else None


def open_regular(path: Path) -> int:
    """A file descriptor of a regular file, to read it; the caller closes it. Symbolic links are followed.

    Raises:
        Refused: it is missing, or not a regular file.
        OSError: it cannot be opened (no permission, too many open files); names the file.
    """
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(path, "missing") from error
    except ValueError as error:  # a name with a null byte
        raise Refused(path, str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Refused(path, "not a regular file")
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, open to be read. What fails while it is read names it: the system alone would not.

    Raises:
        Refused: it is missing, or not a regular file.
        OSError: it cannot be read; names the file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            yield file
        except OSError as error:
            raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_regular(path: Path) -> None:
    """Before a library opens a file by its name: a FIFO would block it for ever.

    Raises:
        Refused: it is missing, or not a regular file.
        OSError: it cannot be opened; names the file.
    """
    os.close(open_regular(path))


def has_file(path: Path) -> bool:
    """Whether a file is there, to be read if it is.

    Raises:
        Refused: something else is there, as a folder, a FIFO or a link that leads nowhere: it is damage, and not the
            same as no file.
        OSError: its folder cannot be read.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise Refused(path, "not a regular file")
    return False


def read_small(path: Path, largest: int = SMALL) -> bytes:
    """The content of a small file.

    Raises:
        Refused: it is missing, not a regular file, or larger than `largest` bytes.
        OSError: it cannot be read; names the file.
    """
    with opened(path) as file:
        # The size that the file system tells may grow meanwhile: at most one byte too many is read.
        data = file.read(largest + 1)
    if len(data) > largest:
        raise Refused(path, f"larger than {largest:,} bytes")
    return data


def load_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        Refused: it is missing, not a regular file, too large, nested too deep, or not JSON (NaN is not).
        OSError: it cannot be read; names the file.
    """
    try:
        return parse_json(read_small(path))
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused(path, f"not a readable JSON file: {error}") from error


def parse_json(data: bytes) -> Any:
    """The value that JSON text in UTF-8 stands for.

    Raises:
        ValueError: it is not JSON, or nested too deep; the text does not name a file.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def printable(text: str) -> str:
    """Text of anybody for one line of a terminal: letters that would end the line, move the cursor, change colours or
    the direction of writing are escaped (`\\x1b`)."""
    return _MOVING.sub(lambda letter: letter[0].encode("unicode_escape").decode(), text)


_MOVING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines and paragraphs, marks of direction (Unicode, UAX 9), and halves of pairs."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
