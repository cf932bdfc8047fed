"""Exactly the named files are read: odd names, copies, links, pipes, compressions; and their present content."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import Refused
from tests.support.texts import documents, opened, refused, rows, table

# -- which files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["part[1].jsonl", "a*.jsonl", "a?.jsonl", "a::b.jsonl", "{a,b}.jsonl", "**.jsonl"])
def test_a_name_is_never_a_pattern(name: str, tmp_path: Path) -> None:
    for other in ("part1.jsonl", "ab.jsonl", "a.jsonl", "b.jsonl"):
        rows(tmp_path / other, "another file")
    rows(tmp_path / name, "the named file")
    assert documents(tmp_path / name) == ["the named file"]
    rows(tmp_path / f"folder {name}" / "t.jsonl", "in a folder")
    assert documents(tmp_path / f"folder {name}") == ["in a folder"]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", "one")
    rows(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", "one")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\26\7")
    (tmp_path / "b.jsonl.tmp").write_text('{"text": "half')
    assert documents(tmp_path) == ["one"]


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    assert documents(rows(tmp_path / ".hidden" / ".a.jsonl", "one")) == ["one"]


def test_a_link_is_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").symlink_to(rows(tmp_path / "one.jsonl", "one"))
    assert documents(tmp_path / "folder") == ["one"]
    (tmp_path / "folder" / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    refused(tmp_path / "folder", r"^source\.text: cannot read .*/b\.jsonl: No such file or directory$")


def test_a_linked_folder_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows(tmp_path / "folder" / "a.jsonl", "one")
    (tmp_path / "folder" / "link").symlink_to(rows(tmp_path / "other" / "b.jsonl", "two").parent)
    assert documents(tmp_path / "folder") == ["one"]
    assert "folder/link is a link to a folder" in caplog.text


@pytest.mark.parametrize("inside", [False, True])
def test_a_named_pipe_is_refused_without_waiting(inside: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    refused(
        tmp_path if inside else tmp_path / "pipe.txt", r"^source\.text: '.*pipe\.txt' is a named pipe, not a file: "
    )


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", "one").chmod(0)
    refused(tmp_path, r"^source\.text: cannot read .*a\.jsonl: Permission denied$")


@pytest.mark.parametrize(("name", "pack"), [("t.jsonl.gz", gzip), ("t.jsonl.bz2", bz2), ("t.jsonl.xz", lzma)])
def test_compressed_files_are_read(name: str, pack: Any, tmp_path: Path) -> None:
    plain = rows(tmp_path / "t.jsonl", "one", None, "two")
    packed = tmp_path / name
    packed.write_bytes(pack.compress(plain.read_bytes()))
    assert documents(packed) == ["", "one", "two"]
    assert opened(packed).identity() == opened(plain).identity()
    packed.write_bytes(packed.read_bytes()[:-6])
    refused(packed, rf"^source\.text: cannot read .*{name}: ")


def test_other_compressions_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    rows(tmp_path / "a.jsonl", "one")
    refused(tmp_path, r"^source\.text: '.*t\.jsonl\.zst': \.zst files are not unpacked here: unpack it")


# -- the present content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_that_was_replaced_is_read_anew(kind: str, tmp_path: Path) -> None:
    identities = []
    path = tmp_path / f"t.{kind}"
    for word in ("alpha", "omega"):
        if kind == "txt":
            path.write_text(word)
        elif kind == "jsonl":
            rows(path, word)
        else:
            table(path, text=[word])
        os.utime(path, (1.7e9, 1.7e9))
        assert documents(path) == [word]
        identities.append(opened(path).identity())
    assert identities[0] != identities[1]


def test_the_identity_is_of_the_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows(tmp_path / name / "a.jsonl", "a", "b")
        rows(tmp_path / name / "b.jsonl", "c")
    os.utime(tmp_path / "two" / "a.jsonl", (5, 5))
    (tmp_path / "two" / "empty.jsonl").write_text("")
    assert opened(tmp_path / "one").identity() == opened(tmp_path / "two", seed=3, streaming=True).identity()
    assert opened(tmp_path / "one").identity().endswith(" of 2 files, 42 bytes")
    rows(tmp_path / "two" / "a.jsonl", "a")
    rows(tmp_path / "two" / "b.jsonl", "b", "c")  # the same bytes, but other files
    assert opened(tmp_path / "one").identity() != opened(tmp_path / "two").identity()


def again(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"199", b"200"))
    os.utime(path, (5, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (again, None),
        (lambda path: os.utime(path, (5, 5)), None),
        (shorter, "has changed since its documents were counted$"),
        (other, "has changed since its documents were counted$"),
        (lambda path: path.unlink(), "cannot read .*: No such file or directory$"),
    ],
    ids=["copied", "touched", "shorter", "other", "gone"],
)
def test_a_file_that_changes_while_it_is_read(
    change: Callable[[Path], None], message: str | None, tmp_path: Path
) -> None:
    path = rows(tmp_path / "t.jsonl", *map(str, range(200)))
    texts = opened(path)
    read = [texts.next()]
    change(path)
    if message is None:
        while (document := texts.next()) is not None:
            read.append(document)
        assert len(set(read)) == 200
        return
    with pytest.raises(Refused, match=message):
        [texts.next() for _ in range(200)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_state_of_a_longer_text_is_refused(streaming: bool, tmp_path: Path) -> None:
    texts = opened(rows(tmp_path / "t.jsonl", *map(str, range(200))), streaming=streaming)
    for _ in range(150):
        texts.next()
    mark = texts.mark()
    shorter_one = opened(rows(tmp_path / "t.jsonl", *map(str, range(100))), streaming=streaming)
    with pytest.raises(Refused, match=r"^source\.text: '.*' is not what it was when the state was saved$"):
        shorter_one.seek(mark)
