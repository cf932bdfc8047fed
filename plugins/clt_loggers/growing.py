"""A file that is only appended to, without a buffer: written data survives a crash, and errors name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


class Growing:
    """An open file. A failed write closes it, so that `close` does not fail once more.

    Raises:
        OSError: from every method; it names the file (the folder is missing, the disk is full).
    """

    def __init__(self, path: Path, mode: Literal["ab", "wb", "xb"]):
        self.path = path
        self._file = path.open(mode, buffering=0)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> None:
        """Append all of it. When this returns, the operating system has the data."""
        rest = memoryview(data)
        try:
            while rest:  # a disk that is nearly full writes a part of it, and fails only at the next call
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self, *, sync: bool = False) -> None:
        """Close it; with `sync`, after all data is on the disk. A second call does nothing."""
        if self.closed:
            return
        try:
            if sync:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
