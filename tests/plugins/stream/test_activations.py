"""The activations that the stream yields, against transformers' own hooks, document by document."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.language_models import CONFIGS, MLPS, WRITTEN, Hooked, save_model, save_text
from tests.support.streams import (
    block,
    build,
    equal,
    pieces,
    segments,
)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_and_padded_activations_equal_hooks_on_each_piece_alone(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    texts = save_text(tmp_path / "text.jsonl", 6)
    truth = Hooked(model, MLPS.get(family, "model.layers.{}.mlp"), WRITTEN.get(family, ""))
    expected = {tuple(piece[1:]): truth(piece) for piece in pieces(truth, texts) if len(piece) > 1}
    for pack in (True, False):
        source = build(model, tmp_path / "text.jsonl", held_out=0.0, pack=pack)
        assert source.packed == pack
        # The block may end within a piece; all pieces of the first epoch are whole.
        found = {tokens: rows for tokens, *rows in segments(block(source)) if tokens in expected}
        assert set(found) == set(expected)
        for tokens, rows in found.items():
            for got, wanted in zip(rows, expected[tokens], strict=True):
                # float32 on both sides, but sums over packed or padded shapes run in another order: what they lose
                # is in proportion to the layer's numbers (of size 1 to 10 here), whatever each of them comes to.
                size = wanted.square().mean((0, 2), keepdim=True).sqrt()
                torch.testing.assert_close(got / size[0], wanted[1:] / size[0], atol=1e-5, rtol=0)


def test_the_middle_layers_of_a_model_are_read_by_path(gpt2: Path, text: Path) -> None:
    chosen = {"layers": [1, 2], "inputs": "transformer.h.{}.ln_2.output", "outputs": "transformer.h.{}.mlp.c_proj"}
    by_path, by_structure = build(gpt2, text, chosen).next(), build(gpt2, text).next()
    assert torch.equal(by_path.inputs, by_structure.inputs[:, 1:])
    assert torch.equal(by_path.targets, by_structure.targets[:, 1:])


def test_sites_are_read_whatever_the_order_the_model_reaches_them_in(gpt2: Path, text: Path) -> None:
    """The targets lie before the inputs here."""
    swapped = {"inputs": "transformer.h.{}.mlp.output", "outputs": "transformer.h.{}.mlp.input"}
    one, two = build(gpt2, text, swapped).next(), build(gpt2, text).next()
    assert torch.equal(one.inputs, two.targets)
    assert torch.equal(one.targets, two.inputs)


def test_a_site_within_another_one_is_read(gpt2: Path, text: Path) -> None:
    """In evaluation nothing follows an MLP's last projection, so both ways read the same numbers."""
    within, whole = build(gpt2, text, {"outputs": "transformer.h.{}.mlp.c_proj"}).next(), build(gpt2, text).next()
    assert equal(within, whole)


def test_the_output_head_is_not_run(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model ran to its end")

    source.model.lm_head.register_forward_hook(refuse)
    source.model.transformer.ln_f.register_forward_hook(refuse)
    assert source.next().tokens == 32


def test_special_and_first_positions_are_left_out(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", adds_bos=True)
    texts = ["a model <eos> reads text", *save_text(tmp_path / "text.jsonl", 6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    truth = Hooked(model, "model.layers.{}.mlp")
    rows = block(build(model, tmp_path / "text.jsonl", held_out=0.0, skip_first=3))
    assert not torch.isin(rows.token_ids, torch.tensor([0, 1, 2])).any()
    # Every piece begins with <bos>, at position 0; positions 1 and 2 are the other ones left out.
    kept = [tuple(piece[3:]) for piece in pieces(truth, texts[1:], start=(0,)) if len(piece) > 3]
    assert set(kept) <= {tokens for tokens, *_ in segments(rows)}
    before, after = truth.tokens("a model "), truth.tokens(" reads text")
    assert {tuple(before[2:]), tuple(after)} <= {tokens for tokens, *_ in segments(rows)}
    for tokens, inputs, _ in segments(rows):
        if tokens == kept[0]:
            piece = next(piece for piece in pieces(truth, texts[1:], start=(0,)) if tuple(piece[3:]) == tokens)
            torch.testing.assert_close(inputs, truth(piece)[0][3:], atol=1e-5, rtol=1e-5)


def test_activations_come_in_the_models_type(gpt2: Path, text: Path) -> None:
    half = build(gpt2, text, {"dtype": "bfloat16"}).next()
    full = build(gpt2, text).next()
    assert half.inputs.dtype == torch.bfloat16
    assert torch.equal(half.token_ids, full.token_ids)
    error = (half.targets.float() - full.targets).norm() / full.targets.norm()
    # bfloat16 keeps 8 bits: a few roundings of 1/256 each.
    assert 1e-4 < error < 0.03


def test_a_model_that_cannot_pack_gets_a_context_per_piece(
    gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that ignores the restart of positions lets packed documents see each other."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with caplog.at_level(logging.WARNING):
        source = build(gpt2, text)
    assert not source.packed
    assert "cannot keep packed documents apart" in caplog.text
    assert equal(source.next(), build(gpt2, text, pack=False).next())


@pytest.mark.slow
@pytest.mark.skipif("CLT_TEST_GGUF" not in os.environ, reason="CLT_TEST_GGUF names no GGUF file of a language model")
def test_a_gguf_file_is_read() -> None:
    source = build(Path(os.environ["CLT_TEST_GGUF"]), "python-stdlib", held_out=0.05, context=64)
    batch = source.next()
    assert batch.inputs.shape == (32, source.n_layers, source.d_model)
    assert torch.isfinite(batch.targets).all()
    assert batch.inputs.std() > 0.01
