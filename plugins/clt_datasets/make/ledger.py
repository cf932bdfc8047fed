"""What a process has written or verified, so that it need not read it again: a line for each file.

A file counts as unchanged while its size, its times and its inode are those in its line. A line is written after the
file is on the disk; a line that is lost costs only that the file is read again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from clt_datasets.format.chunk import Summary, read_summary
from clt_datasets.format.files import append, file_digest, sync, write_file
from clt_datasets.format.folder import ChunkReader
from clt_plugins import DamagedError, Refused, parse_json, read_small


@attrs.frozen
class Line:
    """A file as it was when it was written or verified."""

    file: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: str
    """XXH3-128 of the file, in hexadecimal."""

    @classmethod
    def of(cls, path: Path, digest: str) -> Line:
        """The file as it is now."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, digest)


class Ledger:
    """The lines of one process.

    Args:
        path: the file with the lines; damaged ones are dropped.
        verify: whether to read files all the same.
    """

    def __init__(self, path: Path, *, verify: bool = False):
        self.path, self.verify = path, verify
        self.lines: dict[str, Line] = {}
        """By the file's name; the last one counts."""
        if path.exists():
            complete = self._read()
            if not complete:
                # What is added later must not continue a line that was broken off.
                write_file(path, b"".join(map(_as_bytes, self.lines.values())))

    def add(self, path: Path, digest: str) -> None:
        """Remember a file that was just written and synced.

        Raises:
            OSError: the line could not be written; names the file.
        """
        self.lines[path.name] = line = Line.of(path, digest)
        append(self.path, _as_bytes(line))

    def check(self, path: Path) -> tuple[Summary, str]:
        """The summary and the digest of a chunk that is as it was written; read if it may have changed.

        Raises:
            DamagedError: it is missing, damaged, or another one than was written.
            OSError: it cannot be opened (no permission, too many open files).
        """
        line = self.lines.get(path.name)
        if line is not None and not self.verify and path.is_file() and Line.of(path, line.digest) == line:
            return read_summary(path), line.digest
        reader = ChunkReader(path, page_cache=False)
        before = Line.of(path, "")
        reader.verify()
        digest = file_digest(path)
        if line is not None and digest != line.digest:
            # Complete in itself, but perhaps of another place in the data set.
            raise DamagedError(f"{path}: not the file that was written")
        if Line.of(path, "") != before:
            raise DamagedError(f"{path}: changed while it was read")
        sync(path)
        self.add(path, digest)
        return reader.summary, digest

    def _read(self) -> bool:
        """Read the lines; returns whether all were complete."""
        try:
            data = read_small(self.path)
        except Refused:  # not a file, or far too large
            return False
        complete = data.endswith(b"\n") or not data
        for raw in data.splitlines():
            try:
                line = _line(parse_json(raw))
            except (ValueError, TypeError):
                complete = False
                continue
            self.lines[line.file] = line
        return complete and data.count(b"\n") <= 2 * len(self.lines) + 100


def _line(table: Any) -> Line:
    line = Line(**table)
    for field, value in attrs.asdict(line).items():
        if type(value) is not (str if field in ("file", "digest") else int):
            raise TypeError(field)
    return line


def _as_bytes(line: Line) -> bytes:
    return (json.dumps(attrs.asdict(line)) + "\n").encode()
