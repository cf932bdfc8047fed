"""A stream that has nothing to read says why, and never waits for rows that do not come."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from clt_plugins import Refused
from clt_stream.text.stdlib import is_held_out
from tests.support.language_models import save_text
from tests.support.streams import build
from tests.support.texts import opened


def only(held_out: bool, folder: Path, count: int = 3) -> Path:
    """A text whose documents are all on one side of a split in halves."""
    texts = []
    for n in range(100):
        (folder / "one.txt").write_text(text := f"document {n}: " + "some words " * 40)
        document = opened(folder / "one.txt").next()
        assert document is not None
        if is_held_out(document[0], 0.5) == held_out:
            texts.append(text)
    (folder / "one.txt").unlink()
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))
    return folder / "t.jsonl"


def test_a_text_of_which_all_is_held_out(gpt2: Path, tmp_path: Path) -> None:
    message = (
        r"^source\.held_out: '.*t\.jsonl' holds no text to train on: all 3 documents are held out: lower "
        r"source\.held_out, or cut the text with source\.sample_by$"
    )
    with pytest.raises(Refused, match=message):
        build(gpt2, only(True, tmp_path), held_out=0.5)


def test_a_text_of_which_nothing_is_held_out(gpt2: Path, tmp_path: Path) -> None:
    message = (
        r"^source\.held_out: no held-out text in '.*' at a share of 0\.5 \(none of 3 documents\): raise the share, "
    )
    with pytest.raises(Refused, match=message):
        build(gpt2, only(False, tmp_path), held_out=0.5)


def test_the_text_is_tried_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{")
    with pytest.raises(Refused, match=r"^source\.text: cannot read .*t\.jsonl: row 1: "):
        build(tmp_path / "no model", tmp_path / "t.jsonl")


@pytest.mark.parametrize("read", [True, False])
def test_a_position_in_a_text_that_became_shorter_is_refused(gpt2: Path, text: Path, read: bool) -> None:
    """Whether the chunk of the position was read already (then it used to wait for ever) or not."""
    packer = build(gpt2, text).packer
    packer.next()
    while packer.done < len(packer.chunk):
        packer.next()
    cursor = packer.cursor()
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:20]))
    packer = build(gpt2, text).packer
    if read:
        packer.next()
    with pytest.raises(Refused, match=r"^source\.text: '.*' is not what it was when the state was saved$"):
        packer.seek(cursor)


def test_a_stream_without_rows_ends(gpt2: Path, text: Path) -> None:
    """No piece is long enough any more, as when a data set of the hub changes."""
    packer = build(gpt2, text).packer
    packer.config = attrs.evolve(packer.config, skip_first=1000)
    with pytest.raises(Refused, match=r"^source\.text: '.*' holds no text to train on$"):
        [packer.next() for _ in range(10_000)]


def test_contexts_without_rows_end(gpt2: Path, text: Path) -> None:
    """All tokens are special ones."""
    packer = build(gpt2, text).packer
    packer.special = packer.special.new_tensor(range(packer.vocabulary))
    with pytest.raises(Refused, match=r"^source\.text: '.*' holds no text to train on$"):
        [packer.next() for _ in range(10_000)]


def test_a_chunk_ends_before_it_takes_too_much_memory(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clt_stream.contexts.CHUNK_LIMIT", 1000)
    save_text(tmp_path / "t.jsonl", 40)
    source = build(gpt2, tmp_path / "t.jsonl")
    source.packer._read_chunk()
    tokens = sum(len(piece) for pieces in source.packer.chunk for piece in pieces)
    longest = max(map(len, (tmp_path / "t.jsonl").read_text().splitlines()))
    assert 0 < tokens < 1000 + longest
