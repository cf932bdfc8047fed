"""A file that only grows, without a buffer: what was written outlives the process, and a failure names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


class Growing:
    """An open file. After a failed write it is closed, so that closing it again does not fail a second time.

    Raises:
        OSError: from every method, naming the file (folder missing, disk full).
    """

    def __init__(self, path: Path, mode: Literal["ab", "wb", "xb"]):
        self.path = path
        self._file = path.open(mode, buffering=0)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> None:
        """Append all of it. The operating system has it when this returns."""
        rest = memoryview(data)
        try:
            while rest:  # a disk that is nearly full takes a part, and fails only at the next
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self, *, sync: bool = False) -> None:
        """Close it, with `sync` only when the disk has all. A second time does nothing."""
        if self.closed:
            return
        try:
            if sync:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
