"""Documents of local files: read once to the end, then reached by number.

The first reading checks every row, hashes the content and notes where each document lies: 16 bytes of memory each.
Documents of Parquet and compressed files cannot be reached by position, so their text is put into a temporary file.
Nothing is kept for the next run, so that there is no copy that could be out of date.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from lzma import LZMAError
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import attrs

from clt_plugins import Refused
from clt_stream.text.documents import document, tell_nulls
from clt_stream.text.files import TextFile, cannot_read, local_files, open_file, unpacked
from clt_stream.text.readers import (
    Decoder,
    Hashed,
    Located,
    json_object,
    json_rows,
    line_feeds,
    parquet_rows,
    text_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clt_stream import StreamConfig

log = logging.getLogger(__name__)

IN_MEMORY = 2**26
"""Bytes of unpacked text that are kept in memory; more go to a temporary file."""
BLOCK = 2**22


@attrs.define
class Indexed:
    """A file that has been read."""

    path: Path
    kind: str
    unpacked: bool
    """Whether its documents are in the temporary file."""
    stamp: tuple[int, ...]
    digest: bytes
    first: int
    """The number of its first document."""
    documents: int = 0
    nulls: int = 0


class LocalDocuments:
    """The documents of local files, by number.

    Raises:
        Refused: a file cannot be read, or holds something other than text; they hold no documents.
    """

    def __init__(self, path: Path, config: StreamConfig):
        from tqdm import tqdm

        self.path, self.column, self.sample_by = path, config.text_column, config.sample_by
        self.errors = config.encoding_errors
        self.files: list[Indexed] = []
        self.begins, self.ends = array("q"), array("q")
        self.spool: Any = tempfile.SpooledTemporaryFile(IN_MEMORY, buffering=0)  # noqa: SIM115 - open as long as the documents
        self.bytes = self.spooled = self.nulls = self.replaced = 0
        files = [file for file in local_files(path) if not _is_empty(file.path)]
        if not files:
            raise Refused("source.text", f"{str(path)!r} is empty")
        with tqdm(
            desc="text", unit="B", unit_scale=True, delay=3, disable=None, dynamic_ncols=True, leave=False
        ) as bar:
            for file in files:
                self._index(file, bar)
        self.firsts = [file.first for file in self.files]
        self.count = len(self.begins)
        if not self.count:
            raise Refused("source.text", f"{str(path)!r} holds no documents")
        self._tell()

    def identity(self) -> str:
        """A digest of the content of all files in order, without the empty ones."""
        digest = hashlib.sha256(b"".join(file.digest for file in self.files)).hexdigest()
        return f"sha256 {digest} of {len(self.files)} file{'s' * (len(self.files) > 1)}, {self.bytes} bytes"

    def fetch(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Some documents, as (identity, text).

        Raises:
            Refused: a file is not what it was when it was indexed, or cannot be read.
        """
        texts: dict[int, str | None] = {}
        for index, group in groupby(sorted(numbers), key=lambda number: bisect_right(self.firsts, number) - 1):
            file = self.files[index]
            try:
                if file.unpacked:
                    texts |= {number: self._at(self.spool, number).decode() for number in group}
                else:
                    with self._unchanged(file) as opened:
                        texts |= {number: self._parsed(file, self._at(opened, number)) for number in group}
            except OSError as error:  # of a read, which does not name the file
                raise cannot_read(file.path, error) from error
        return [document(texts[number], self.column, str(self.path)) for number in numbers]

    def _index(self, file: TextFile, bar: Any) -> None:
        digest, size, shown = hashlib.sha256(), 0, 0

        def tell(data: bytes) -> None:
            nonlocal size, shown
            digest.update(data)
            size += len(data)
            if size - shown > BLOCK:
                bar.update(size - shown)
                shown = size

        decode = Decoder(file.path, self.errors == "replace")
        with open_file(file.path) as opened:
            stamp, first = _stamp(opened), len(self.begins)
            indexed = Indexed(
                file.path, file.kind, bool(file.compression) or file.kind == ".parquet", stamp, b"", first
            )
            try:
                for row in self._rows(file, opened, tell, decode):
                    indexed.nulls += row.text is None
                    self._add(row, indexed)
            except (EOFError, LZMAError, zlib.error, OSError) as error:
                raise cannot_read(file.path, error if isinstance(error, OSError) else str(error)) from error
        indexed.documents = len(self.begins) - first
        indexed.digest = digest.digest()
        self.files.append(indexed)
        self.bytes += size
        self.nulls += indexed.nulls
        self.replaced += decode.replaced

    def _rows(self, file: TextFile, opened: IO[bytes], tell: Any, decode: Decoder) -> Iterator[Located]:
        if file.kind == ".parquet":
            while data := opened.read(BLOCK):
                tell(data)
            opened.seek(0)
            return parquet_rows(opened, decode, self.column)
        content = Hashed(unpacked(file, opened), file.path, tell)
        if file.kind == ".jsonl":
            return json_rows(content, decode, self.column)
        return text_rows(content, decode, self.sample_by)

    def _add(self, row: Located, file: Indexed) -> None:
        begin, end = row.begin, row.end
        if file.unpacked:
            data = (row.text or "").encode("utf-8", "replace")
            begin, end = self.spooled, self.spooled + len(data)
            try:
                self.spool.write(data)
            except OSError as error:
                raise Refused(
                    "source.text",
                    f"no space to unpack {file.path} in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a "
                    f"folder on a larger disk",
                ) from error
            self.spooled = end
        self.begins.append(begin)
        self.ends.append(end)

    def _at(self, opened: IO[bytes], number: int) -> bytes:
        begin, end = self.begins[number], self.ends[number]
        opened.seek(begin)
        return opened.read(end - begin)

    def _parsed(self, file: Indexed, data: bytes) -> str | None:
        text = data.decode("utf-8", self.errors if self.errors == "replace" else "strict")
        return json_object(text, file.path).get(self.column) if file.kind == ".jsonl" else line_feeds(text)

    def _unchanged(self, file: Indexed) -> IO[bytes]:
        """The file, opened again.

        Only where something about it is new (its time, too) is its content compared: a copy of the same content is no
        change.
        """
        opened = open_file(file.path)
        stamp = _stamp(opened)
        if stamp != file.stamp:
            if hashlib.file_digest(opened, "sha256").digest() != file.digest:  # type: ignore[arg-type]
                opened.close()
                raise Refused("source.text", f"{str(file.path)!r} has changed since its documents were counted")
            file.stamp = stamp
        return opened

    def _tell(self) -> None:
        """Count what is read as something else than it is, once."""
        if self.nulls:
            only = [str(file.path) for file in self.files if file.documents and file.nulls == file.documents]
            more = f" (and {len(only) - 3} more)" if len(only) > 3 else ""
            tell_nulls(self.nulls, self.count, f"; only nulls: {', '.join(only[:3])}{more}" if only else "")
        if self.replaced:
            log.warning("source.text: %d documents had bytes that are not UTF-8, and were replaced", self.replaced)


def _is_empty(path: Path) -> bool:
    with open_file(path) as opened:
        try:
            return not opened.read(1)
        except OSError as error:
            raise cannot_read(path, error) from error


def _stamp(opened: IO[bytes]) -> tuple[int, ...]:
    """What the system knows about a file; another content always has another one (the last time cannot be set)."""
    status = os.fstat(opened.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
