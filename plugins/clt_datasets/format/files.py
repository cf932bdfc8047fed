"""What all files of a data set need: checksums, and files that are either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

PIECE = 2**20
"""Bytes of a file that are read at a time."""


def digest(*buffers: Any) -> int:
    """XXH3-64 of some buffers, one after the other."""
    state = xxhash.xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


def file_digest(path: Path) -> str:
    """XXH3-128 of a file, 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            state.update(piece)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that it survives a loss of power."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file; a reader sees all of it, or the file that was there before."""
    # Several processes may write the same file at the same time.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    publish(partial, path)
