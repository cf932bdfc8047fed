"""Which files a path stands for, and how they are opened: exactly the named ones.

Names are never patterns. In folders, hidden files and folders are left out: they are copies and half-written files of
other programs (`.ipynb_checkpoints`, `._a.jsonl`).
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import attrs

from clt_plugins import Refused

log = logging.getLogger(__name__)

KINDS = (".txt", ".jsonl", ".parquet")
"""File endings that are read."""

UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""What may follow `.txt` and `.jsonl`: compressions of Python's standard library."""

NOT_UNPACKED = frozenset({".zst", ".zstd", ".lz4", ".zip", ".7z", ".br", ".lzma", ".snappy", ".z"})
"""Compressed and packed files that are refused by name, so that none of a folder is left out in silence."""


@attrs.frozen
class TextFile:
    """A file with text."""

    path: Path
    kind: str
    """One of `KINDS`."""
    compression: str = ""
    """A key of `UNPACKERS`, or empty."""


def is_local(name: str) -> bool:
    """Whether a setting `text` means a file or folder, and not a data set of the hub."""
    path = local_path(name)
    return name.startswith(("/", ".", "~")) or _kind(path) is not None or os.path.lexists(path)


def local_path(name: str) -> Path:
    """A setting `text` as a path."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - unlike Path's, does not fail where there is no such user


def local_files(path: Path) -> list[TextFile]:
    """The files that a path stands for, in order, all of one kind.

    Raises:
        Refused: there are none, they are of several kinds, or one of them cannot be read here.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last for a name with a NUL in it
        raise Refused("source.text", f"no file or folder {str(path)!r}") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    if not stat.S_ISDIR(mode):
        return [_text_file(path)]
    files = [_text_file(file) for file in sorted(_below(path)) if _kind(file) is not None]
    kinds = sorted({file.kind for file in files})
    if not files:
        raise Refused("source.text", f"no {', '.join(KINDS)} files in {str(path)!r}")
    if len(kinds) > 1:
        raise Refused(
            "source.text", f"{str(path)!r} mixes {' and '.join(kinds)} files: put each kind in its own folder"
        )
    return files


def open_file(path: Path) -> IO[bytes]:
    """A file, opened for reading. Never waits, as a named pipe without a writer would.

    Raises:
        Refused: it is not there, cannot be opened, or is no regular file.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise Refused("source.text", f"{str(path)!r} is {_named(mode)}, not a file: write its content to a file")
        return path.open("rb")
    except OSError as error:
        raise cannot_read(path, error) from error


def unpacked(file: TextFile, opened: IO[bytes]) -> IO[bytes]:
    """The content of a file, without its compression."""
    return UNPACKERS[file.compression](opened) if file.compression else opened


def cannot_read(path: Path, reason: Any) -> Refused:
    """The error where a file cannot be read.

    Args:
        reason: an error of the system, or text.
    """
    told = reason.strerror or str(reason) if isinstance(reason, OSError) else reason
    return Refused("source.text", f"cannot read {path}: {told}")


def _kind(path: Path) -> tuple[str, str] | None:
    """The kind and the compression that a file's name tells; None if it tells no kind."""
    ending = path.suffix.lower()
    if ending in KINDS:
        return ending, ""
    inner = Path(path.stem).suffix.lower()
    if inner in KINDS and (ending in UNPACKERS or ending in NOT_UNPACKED):
        return inner, ending
    return None


def _text_file(path: Path) -> TextFile:
    kind, compression = _kind(path) or ("", "")
    if not kind:
        raise Refused("source.text", f"{str(path)!r}: expected one of {', '.join(KINDS)}")
    if compression in NOT_UNPACKED or (compression and kind == ".parquet"):
        raise Refused(
            "source.text",
            f"{str(path)!r}: {compression} files are not unpacked here: unpack it (.txt and .jsonl may also be "
            f"compressed as {', '.join(UNPACKERS)})",
        )
    return TextFile(path, kind, compression)


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, without hidden ones."""

    def fail(error: OSError) -> None:
        raise cannot_read(Path(error.filename or folder), error) from error

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (link := Path(root, name)).is_symlink():
                log.warning("source.text: %s is a link to a folder, and not followed: name that folder itself", link)
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _named(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder"}
    return next((text for test, text in kinds.items() if test(mode)), "a device")
