"""Rows as they are found: other columns, nulls, broken rows, bytes that are not UTF-8, every kind of line end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from clt_stream.text import readers
from tests.support.texts import documents, refused, rows, table

# -- which rows and columns ---------------------------------------------------------------------------------------


def test_only_the_column_with_the_text_is_read(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", "one")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "two", "n": 1}\n{"text": "three", "n": "n/a"}\n{"n": {"a": [1, NaN]}, "text": "four"}\n'
        f'{{"text": "five", "n": {"9" * 5000}}}\n'
    )
    assert documents(tmp_path) == ["five", "four", "one", "three", "two"]


def test_only_the_column_with_the_text_is_read_of_parquet_files(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", text=["one"], n=[1])
    table(tmp_path / "b.parquet", n=["x"], text=pa.array(["two"]).dictionary_encode())
    assert documents(tmp_path) == ["one", "two"]
    table(tmp_path / "dots" / "a.parquet", **{"a.b": ["right"], "a": [{"b": "wrong"}]})
    assert documents(tmp_path / "dots", text_column="a.b") == ["right"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    both = pa.table([pa.array(["right"]), pa.array(["wrong"])], names=["text", "text"])
    parquet.write_table(both, tmp_path / "a.parquet")
    refused(tmp_path, r"^source\.text_column: '.*a\.parquet' has several columns 'text': rename all but one$")


def write_nulls(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        rows(folder / "a.jsonl", *[None] * 50)
        rows(folder / "b.jsonl", "one", None, "two")
        (folder / "c.jsonl").write_text("")
    else:
        table(folder / "a.parquet", text=pa.nulls(50))
        table(folder / "b.parquet", text=["one", None, "two"])
        table(folder / "c.parquet", other=pa.array([], pa.int64()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nulls_and_empty_files_are_alike_everywhere_and_counted(
    kind: str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_nulls(tmp_path, kind)
    assert documents(tmp_path, streaming=streaming) == [*[""] * 51, "one", "two"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"source.text: 51 of 53 documents are null, and read as empty ones; only nulls: {tmp_path / 'a'}.{kind}"
    )


def test_a_missing_column_is_named_with_its_file(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", "one")
    (tmp_path / "b.jsonl").write_text('{"txt": "two", "n": 1}\n')
    message = r"^source\.text_column: '.*b\.jsonl' has no column 'text', did you mean 'txt'\? \(it has: txt, n\)$"
    refused(tmp_path, message)
    (tmp_path / "b.jsonl").write_text('{"n": 1}\n{"text": "two"}\n')
    assert documents(tmp_path) == ["", "one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', r"column 'text' of '.*t\.jsonl' holds int, not text in row 3: name the column"),
        ('{"text": ["a"]}', r"column 'text' of '.*t\.jsonl' holds list, not text in row 3: "),
        ('["a"]', r"cannot read .*t\.jsonl: row 3: list, not an object such as "),
        ('{"text": "a"', r"cannot read .*t\.jsonl: row 3: not one JSON object: "),
        ('{"text": "a"} {"text": "b"}', r"cannot read .*t\.jsonl: row 3: not one JSON object: "),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", r"cannot read .*t\.jsonl: row 3: nested too deep$"),
        ('{"text": "a", "n": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, r"t\.jsonl: row 3: nested too deep$"),
    ],
    ids=["number", "list", "no object", "broken", "two objects", "deep text", "deep elsewhere"],
)
def test_a_row_that_cannot_be_read_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    refused(tmp_path / "t.jsonl", message)


def test_a_document_that_is_too_long_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST", 1000)
    (tmp_path / "t.txt").write_text("word \n" * 200)
    refused(tmp_path / "t.txt", r'row 1: a document of more than .*: set source\.sample_by = "paragraph" or "line"$')
    refused(tmp_path / "t.txt", r'row 1: .*: set source\.sample_by = "line"$', sample_by="paragraph")
    assert len(documents(tmp_path / "t.txt", sample_by="line")) == 200
    refused(rows(tmp_path / "t.jsonl", "short", "word " * 200), r"t\.jsonl: row 2: a document of more than ")
    refused(table(tmp_path / "t.parquet", text=["short", "w" * 1001]), r"t\.parquet: row 2: a document of more than ")


# -- bytes --------------------------------------------------------------------------------------------------------


def write_bad(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A file whose third row is not UTF-8, and settings to read it."""
    path = folder / f"t.{kind}"
    if kind == "jsonl":
        path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n{"text": "c\xff"}\r\n')
    elif kind == "parquet":
        offsets, data = pa.array([0, 1, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"abc\xff")
        table(path, text=pa.StringArray.from_buffers(3, offsets, data))
    else:
        path.write_bytes(b"a\r\nb\rc\xff\n")
    return path, {"sample_by": "line"} if kind == "txt" else {}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_bytes_that_are_not_utf8_are_named_at_the_start_or_replaced(
    kind: str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, settings = write_bad(tmp_path, kind)
    message = (
        rf"^source\.text: cannot read .*t\.{kind}: row 3: byte 0xff is not UTF-8: .*encoding_errors = \"replace\"$"
    )
    refused(path, message, streaming=streaming, **settings)
    replaced = documents(path, streaming=streaming, encoding_errors="replace", **settings)
    assert replaced == ["a", "b", "c\N{REPLACEMENT CHARACTER}"]
    assert "1 documents had bytes that are not UTF-8" in caplog.text


@pytest.mark.parametrize("sample_by", ["document", "paragraph"])
def test_the_row_of_a_bad_byte_is_its_line(sample_by: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\nb\n\nc\r\nd\xff\n")
    refused(tmp_path / "t.txt", r"t\.txt: row 5: byte 0xff ", sample_by=sample_by)


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    refused(path, r"t\.jsonl: row 2: half of a surrogate pair, \\ud83d, is no character: ")
    assert documents(path, encoding_errors="replace") == ["?", "\N{GRINNING FACE}"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_utf16_is_named_even_where_bytes_are_replaced(kind: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / f"t.{kind}").write_bytes('{"text": "some words"}\n'.encode(encoding))
    message = r"^source\.text: cannot read .*: it is UTF-16 or UTF-32, or no text: convert it to UTF-8$"
    refused(tmp_path / f"t.{kind}", message, encoding_errors="replace")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    for name in ("t.txt", "t.jsonl"):
        assert documents(tmp_path / name) == ["one"]
    assert documents(tmp_path / "t.txt", sample_by="line") == ["one"]


def test_all_line_ends_are_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\rc\n\r\nd\r\n")
    assert documents(tmp_path / "t.txt") == ["a\nb\nc\n\nd\n"]
    assert documents(tmp_path / "t.txt", sample_by="paragraph") == ["a\nb\nc", "d\n"]
    assert documents(tmp_path / "t.txt", sample_by="line") == ["", "a", "b", "c", "d"]


def test_paragraphs_are_what_two_line_feeds_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "\n\na\n\n\nb\nc\n \nd\n\n\n\ne\n"
    (tmp_path / "t.txt").write_text(text)
    expected = sorted(part for part in text.split("\n\n") if part)
    assert documents(tmp_path / "t.txt", sample_by="paragraph") == expected
    assert "1 lines hold only blanks" in caplog.text
