"""What all files of a data set need: checksums, and files that are either complete or absent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from clt_plugins import DamagedError, flush

PIECE = 2**20
"""Bytes of a file that are read at a time."""


def digest(*buffers: Any) -> int:
    """XXH3-64 of some buffers, one after the other."""
    state = xxhash.xxh3_64()
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, piece by piece.

    Raises:
        DamagedError: it is missing, or no file: to open a named pipe would wait for ever.
        OSError: it cannot be read; names it.
    """
    if not path.is_file():
        raise DamagedError(f"{path}: missing, or not a file")
    with naming(path, "read"), path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def file_digest(path: Path) -> str:
    """XXH3-128 of a file, 32 hexadecimal digits; raises like `file_pieces`."""
    state = xxhash.xxh3_128()
    for piece in file_pieces(path):
        state.update(piece)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk; errors name it."""
    with naming(path):
        flush(path)


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that it survives a loss of power."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_file(path: Path, data: Any) -> None:
    """Write a file from memory; see `write_pieces`."""
    write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[Any]) -> None:
    """Write a file: after an error, and for a reader at any moment, the file that was there before is there.

    Only one process may write a file at a time.

    Args:
        pieces: bytes, or contiguous arrays, one after the other.

    Raises:
        OSError: it could not be written (disk full, no permission); names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            # Unbuffered: what could not be written is an error of this call, and of no later one.
            with partial.open("wb", buffering=0) as file:
                for piece in pieces:
                    write_all(file, piece)
            publish(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file that one process writes.

    Raises:
        OSError: it could not be written, or only in part; names the file.
    """
    with naming(path), path.open("ab", buffering=0) as file:
        write_all(file, data)


def write_all(file: Any, data: Any) -> None:
    """Write bytes to an unbuffered file, which may accept only some of them at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def naming(path: Path, doing: str = "written") -> Iterator[None]:
    """Errors of the system get the name of the file; failed writes have none."""
    try:
        yield
    except DamagedError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path}: could not be {doing}: {error.strerror}") from error
