"""Contexts: pieces of documents, cut and packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_stream.contexts import fill
from tests.support.streams import (
    build,
)


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


def test_pieces_are_packed_whole_into_few_contexts() -> None:
    pieces = [[n] * length for n, length in enumerate([5, 7, 3, 1, 9, 10, 2, 3])]
    contexts = fill(pieces, 10)
    assert sorted(piece for context in contexts for piece in context) == sorted(pieces)
    assert all(sum(map(len, context)) <= 10 for context in contexts)
    # 40 tokens in contexts of 10: no arrangement needs fewer.
    assert len(contexts) == 4
