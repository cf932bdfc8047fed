"""A digest of a file of activations that has no checksums.

Data sets are too large to be read before each run. Other activations differ everywhere, and so does what HDF5 makes of
them, above all where it is compressed. So the size and stretches from all over the file tell other data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from clt_plugins import Refused

SMALL = 4 * 2**20
"""A file of so many bytes is read completely."""
STRETCH = 4096
"""Bytes of a stretch of a larger file."""
STRETCHES = 64
"""How many of them are read."""


def file_digest(file: Path) -> bytes:
    """
    Raises:
        Refused: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            count = -(-size // STRETCH) if size <= SMALL else STRETCHES
            for number in range(count):
                place = number * STRETCH if size <= SMALL else (size - STRETCH) * number // (STRETCHES - 1)
                opened.seek(place)
                digest.update(opened.read(STRETCH))
    except OSError as error:
        raise Refused(file, f"cannot be read: {error.strerror}") from error
    return digest.digest()
