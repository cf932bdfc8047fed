"""Contexts: pieces of documents, cut and packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clt_stream.contexts import fill
from tests.support.language_models import save_text
from tests.support.streams import build, join, segments


@pytest.mark.parametrize("pack", [True, False])
def test_contexts_are_pieces_one_after_the_other(gpt2: Path, text: Path, pack: bool) -> None:
    """Against a loop over each context's pieces, token by token."""
    packer = build(gpt2, text, pack=pack, skip_first=2).packer
    special = packer.tokenizer.all_special_ids
    for number in range(0, 12, 3):
        contexts = packer.next()
        chosen = packer.chunk[number : number + 3]
        assert (packer.first, contexts.first, len(contexts.ids)) == (0, number, 3)
        length = max(sum(map(len, pieces)) for pieces in chosen)
        kept = []
        for row, pieces in enumerate(chosen):
            used = [(token, place) for piece in pieces for place, token in enumerate(piece)]
            padding = [(0, place) for place in range(length - len(used))]
            assert list(zip(contexts.ids[row].tolist(), contexts.position_ids[row].tolist(), strict=True)) == [
                *used,
                *padding,
            ]
            if not pack:
                assert contexts.attention_mask[row].tolist() == [1] * len(used) + [0] * len(padding)
            kept += [row * length + at for at, (token, place) in enumerate(used) if place >= 2 and token not in special]
        assert contexts.rows.tolist() == kept
        assert (contexts.attention_mask is None) == pack


@pytest.mark.parametrize("pack", [True, False])
def test_packed_pieces_are_no_neighbours_though_no_position_is_left_out(gpt2: Path, tmp_path: Path, pack: bool) -> None:
    """`collect` joined ten documents in one window."""
    texts = save_text(tmp_path / "text.jsonl", 60, longest=4)
    source = build(gpt2, tmp_path / "text.jsonl", pack=pack, skip_first=0)
    rows = join([*source.held_out(1000)])
    documents = {tuple(source.tokenizer(text)["input_ids"]) for text in texts}
    assert {tokens for tokens, _, _ in segments(rows)} <= documents
    assert len(segments(rows)) > 10


def test_tokens_that_are_marked_as_special_are_left_out_though_none_names_them(gpt2: Path, tmp_path: Path) -> None:
    """As Llama 3 has those around a role of a chat."""
    state = json.loads((gpt2 / "tokenizer.json").read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    role = state["model"]["vocab"].pop(last)
    state["model"]["merges"] = [one for one in state["model"]["merges"] if "".join(one) != last]
    state["added_tokens"].append({**state["added_tokens"][0], "id": role, "content": "<|role|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text((gpt2 / "tokenizer_config.json").read_text())
    texts = [f"<|role|>a layer of text<|role|>reads the model {number}" for number in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = build(gpt2, tmp_path / "text.jsonl", {"tokenizer": str(tmp_path)}, skip_first=0)
    assert role not in source.tokenizer.all_special_ids
    assert source.tokenizer(texts[0])["input_ids"].count(role) == 2
    assert role not in source.next().token_ids


def test_pieces_are_packed_whole_into_few_contexts() -> None:
    pieces = [[n] * length for n, length in enumerate([5, 7, 3, 1, 9, 10, 2, 3])]
    contexts = fill(pieces, 10)
    assert sorted(piece for context in contexts for piece in context) == sorted(pieces)
    assert all(sum(map(len, context)) <= 10 for context in contexts)
    # 40 tokens in contexts of 10: no arrangement needs fewer.
    assert len(contexts) == 4
