"""The documents of one file, in its order: of text files, JSON lines and Parquet files.

Only the column with the text is read, so that no other column can be wrong. All that can be wrong with a file is found
here, before work starts, and named with the file and the row. A row is a line of a .txt or .jsonl file, or a row of a
Parquet file, counted from 1.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import attrs

from clt_plugins import Refused
from clt_stream.library_errors import one_line
from clt_stream.text.documents import no_column, not_text
from clt_stream.text.files import cannot_read

log = logging.getLogger(__name__)

LONGEST = 2**27
"""Bytes of the longest document, or line of a file. A longer one would take gigabytes of memory."""

NEWLINE = re.compile(rb"\r\n|\r|\n")
BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Files that begin with these are not UTF-8; UTF-32 begins with the first, or with zeros."""


@attrs.frozen
class Located:
    """A document, and where its bytes are in the file."""

    text: str | None
    """None for a null."""
    begin: int = 0
    end: int = 0


@attrs.define
class Decoder:
    """Decodes the rows of a file as UTF-8.

    Args:
        replace: put U+FFFD in place of what is not UTF-8, and count the documents, rather than refuse them.
    """

    path: Path
    replace: bool
    replaced: int = 0

    def __call__(self, data: bytes, row: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if not self.replace:
                row += len(NEWLINE.findall(data, 0, error.start))
                raise cannot_read(
                    self.path,
                    f"row {row}: byte 0x{data[error.start]:02x} is not UTF-8: convert the file, or set "
                    f'source.encoding_errors = "replace"',
                ) from error
        self.replaced += 1
        return data.decode(errors="replace")


class Hashed:
    """A binary file. All that is read goes to `tell`, which hashes it and shows the progress."""

    def __init__(self, file: IO[bytes], path: Path, tell: Callable[[bytes], None]):
        self.file, self.path, self.tell = file, path, tell

    def read(self, remedy: str) -> bytes:
        """All of it."""
        return self._checked(self.file.read(LONGEST + 1), 1, remedy, start=True)

    def lines(self, remedy: str) -> Iterator[tuple[int, bytes]]:
        """(number, line) up to and with each line feed, without a byte-order mark."""
        number = 0
        while line := self.file.readline(LONGEST + 1):
            number += 1
            yield number, self._checked(line, number, remedy, start=number == 1)

    def _checked(self, data: bytes, row: int, remedy: str, *, start: bool) -> bytes:
        if len(data) > LONGEST:
            raise too_long(self.path, row, remedy)
        self.tell(data)
        if start:
            head = data[:4096]
            if head.startswith(BYTE_ORDER_MARKS) or head.count(0) * 4 > len(head):
                raise cannot_read(self.path, "it is UTF-16 or UTF-32, or no text: convert it to UTF-8")
        return data


def text_rows(file: Hashed, decode: Decoder, sample_by: str) -> Iterator[Located]:
    """The documents of a text file. Every kind of line end becomes a line feed."""
    if sample_by == "document":
        data = file.read('set source.sample_by = "paragraph" or "line"')
        mark = _mark(data)
        if len(data) > mark:
            yield Located(line_feeds(decode(data[mark:], 1)), mark, len(data))
    elif sample_by == "paragraph":
        for row, begin, data in _paragraphs(file):
            yield Located(line_feeds(decode(data, row)), begin, begin + len(data))
    else:
        for row, begin, line, _ in _lines(file):
            yield Located(decode(line, row), begin, begin + len(line))


def json_rows(file: Hashed, decode: Decoder, column: str) -> Iterator[Located]:
    """The documents of a JSON-lines file. A row without the column is a null.

    Raises:
        Refused: a row is no JSON object, or holds something other than text; no row has the column.
    """
    begin, columns, has_column = 0, None, False
    for row, line in file.lines("cut it into shorter ones"):
        start, begin = begin, begin + len(line)
        mark = _mark(line) if row == 1 else 0
        if not line[mark:].strip():
            continue
        value = json_object(decode(line[mark:], row), file.path, row)
        columns = list(value) if columns is None else columns
        has_column = has_column or column in value
        text = value.get(column)
        if text is not None and not isinstance(text, str):
            raise not_text(text, column, str(file.path), row)
        if text is not None and b"\\u" in line:
            _check_surrogates(text, decode, row)
        yield Located(text, start + mark, begin)
    if columns is not None and not has_column:
        raise no_column(column, str(file.path), columns)


def json_object(line: str, path: Path, row: int | None = None) -> dict[str, Any]:
    """A line's object. Python's reader never ends the process, however deep a value is nested."""
    where = "" if row is None else f"row {row}: "
    try:
        value = _strict.decode(line)
    except RecursionError:
        raise cannot_read(path, f"{where}nested too deep") from None
    except json.JSONDecodeError as error:
        raise cannot_read(path, f"{where}not one JSON object: {error.msg} (at character {error.pos + 1})") from error
    except ValueError:  # an integer with more digits than Python reads; it is in a column that is not needed
        value = _lax.decode(line)
    if not isinstance(value, dict):
        raise cannot_read(path, f'{where}{type(value).__name__}, not an object such as {{"text": "..."}}')
    return value


_strict = json.JSONDecoder(strict=False)
_lax = json.JSONDecoder(strict=False, parse_int=float)


def parquet_rows(file: IO[bytes], decode: Decoder, column: str) -> Iterator[Located]:
    """The documents of a Parquet file; only the column with the text is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, row = decode.path, 0
    try:
        table = pq.ParquetFile(file)
        if not table.metadata.num_rows:
            return
        names = table.schema_arrow.names
        if column not in names:
            raise no_column(column, str(path), names)
        if names.count(column) > 1:
            raise Refused("source.text_column", f"{str(path)!r} has several columns {column!r}: rename all but one")
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            values = batch.column(batch.schema.get_field_index(column))
            kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
            if str(kind) not in {"string", "large_string", "string_view", "null"}:
                raise not_text(str(kind), column, str(path), row + 1)
            for data in values.cast(pa.large_binary()).to_pylist():
                row += 1
                if data is not None and len(data) > LONGEST:
                    raise too_long(path, row, "cut it into shorter ones")
                yield Located(None if data is None else decode(data, row))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise cannot_read(path, one_line(error)) from error


def too_long(path: Path, row: int, remedy: str) -> Refused:
    """The error where a document is too long."""
    return cannot_read(path, f"row {row}: a document of more than {LONGEST // 2**20} MiB: {remedy}")


def line_feeds(text: str) -> str:
    """The text with every kind of line end as a line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _mark(data: bytes) -> int:
    """The bytes of a byte-order mark."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def _lines(file: Hashed) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(row, begin, line, line end) by every kind of line end."""
    row = position = 0
    for number, data in file.lines("cut it into shorter lines"):
        at = _mark(data) if number == 1 else 0
        for end in NEWLINE.finditer(data, at):
            row += 1
            yield row, position + at, data[at : end.start()], end.group()
            at = end.end()
        if at < len(data):
            row += 1
            yield row, position + at, data[at:], b""
        position += len(data)


def _paragraphs(file: Hashed) -> Iterator[tuple[int, int, bytes]]:
    """(row, begin, data) of what lies between empty lines: what splitting at two line feeds gives."""
    row = begin = blanks = 0
    data, feed = bytearray(), b""
    for number, start, line, end in _lines(file):
        if end and not line and feed:
            if content := bytes(data[: len(data) - len(feed)]):
                yield row, begin, content
            data, feed = bytearray(), b""
            continue
        if not data:
            row, begin = number, start
        blanks += line.isspace()
        data += line + end
        feed = end
        if len(data) > LONGEST:
            raise too_long(file.path, row, 'set source.sample_by = "line"')
    if data:
        yield row, begin, bytes(data)
    if blanks:
        log.warning(
            "source.text: %s: %d lines hold only blanks, and are no boundaries of paragraphs", file.path, blanks
        )


def _check_surrogates(text: str, decode: Decoder, row: int) -> None:
    """Refuse or count a half of a surrogate pair: `"\\ud83d"` is a text of JSON, but no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if not decode.replace:
            raise cannot_read(
                decode.path,
                f"row {row}: half of a surrogate pair, \\u{ord(text[error.start]):04x}, is no character: correct the "
                f'file, or set source.encoding_errors = "replace"',
            ) from error
        decode.replaced += 1
