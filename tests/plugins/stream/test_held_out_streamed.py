"""Held-out text that is not kept in memory: the same batches, read as they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clt_stream import held_out
from tests.support.language_models import save_model, save_text
from tests.support.streams import build, equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 40)
    return folder


@pytest.mark.parametrize("tokens", [101, 160, 250, 100_000])
def test_batches_are_those_that_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    kept = build(folder / "gpt2", folder / "text.jsonl")
    expected = list(kept.held_out(tokens))
    assert kept.held_out_rows.kept
    monkeypatch.setattr(held_out, "KEPT", 0)
    streamed = build(folder / "gpt2", folder / "text.jsonl")
    for _ in range(2):
        batches = list(streamed.held_out(tokens))
        assert len(batches) == len(expected)
        assert all(equal(one, two) for one, two in zip(batches, expected, strict=True))
    assert not streamed.held_out_rows.kept


def test_the_model_runs_as_far_as_batches_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "KEPT", 0)
    streamed = build(folder / "gpt2", folder / "text.jsonl")
    passes = []
    read = streamed.reader.read
    monkeypatch.setattr(streamed.reader, "read", lambda *args: (passes.append(1), read(*args))[1])
    batches = streamed.held_out(250)
    next(batches)
    first = len(passes)
    list(batches)
    assert 0 < first < len(passes)


@pytest.mark.parametrize("kept", [2**40, 0], ids=["kept", "streamed"])
def test_a_forward_pass_without_a_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """A document of special tokens alone, in a pass of its own."""
    text = "a feature of layer writes"
    documents = [text, "<eos><eos><eos>", f"{text} {text}", "<bos><eos>"] * 5
    documents = [f"{one}<eos>" * (number + 1) for number, one in enumerate(documents)]  # no two are the same
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    monkeypatch.setattr(held_out, "KEPT", kept)
    source = build(folder / "gpt2", tmp_path / "text.jsonl", pack=False, model_batch=1, held_out=0.5)
    read = []
    real = source.reader.read

    def counted(contexts: Any, rows: Any, *args: Any) -> None:
        read.append(len(rows))
        real(contexts, rows, *args)

    monkeypatch.setattr(source.reader, "read", counted)
    rows = sum(batch.tokens for batch in source.held_out(10_000))
    assert rows == sum(read) and 0 in read
