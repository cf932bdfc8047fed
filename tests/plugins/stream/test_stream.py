"""The order of the stream: epochs, held-out text, resumed runs, several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_stream import StreamConfig, clt_sources
from tests.support.language_models import MLPS, Hooked, make_context, save_text
from tests.support.streams import (
    CONTEXT,
    build,
    equal,
    join,
    order_of,
    pieces,
    segments,
    segments_by_context,
    trained,
)


def test_an_epoch_holds_every_row_once(gpt2: Path, text: Path, tmp_path: Path) -> None:
    texts = save_text(tmp_path / "text.jsonl", 40)
    truth = Hooked(gpt2, MLPS["gpt2"])
    wanted = sorted(tuple(piece[1:]) for piece in pieces(truth, trained(texts)) if len(piece) > 1)
    source = build(gpt2, text, buffer_tokens=4096)
    rows = join([source.next() for _ in range(4096 // 32)])
    epoch = sum(map(len, wanted))
    contexts = sorted(segments_by_context(rows).items())
    found: list[tuple[int, ...]] = []
    for _, held in contexts:
        if sum(map(len, found)) < epoch:
            found += held
    assert sorted(found) == wanted


def test_held_out_documents_never_occur_in_training_batches(gpt2: Path, tmp_path: Path) -> None:
    texts = save_text(tmp_path / "text.jsonl", 40)
    truth = Hooked(gpt2, MLPS["gpt2"])
    source = build(gpt2, tmp_path / "text.jsonl")
    held = join(list(source.held_out(100_000)))
    seen = join([source.next() for _ in range(100)])
    kept_apart = {tuple(piece[1:]) for piece in pieces(truth, trained(texts, held_out=True)) if len(piece) > 1}
    assert {tokens for tokens, *_ in segments(held)} == kept_apart
    # Runs of a few tokens occur in many of these documents of 19 words.
    long = {tokens for tokens in kept_apart if len(tokens) > 8}
    assert len(long) > 5
    assert not long & {tokens for tokens, *_ in segments(seen)}


def test_the_bytes_of_its_rows_are_those_that_it_takes(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    (device, stated), *others = source.buffer_bytes().items()
    source.next()
    list(source.held_out(100))
    activations = source.rows.inputs, source.rows.targets
    held_out = {
        x.untyped_storage().data_ptr(): x for batch in source.held_out_rows.kept for x in (batch.inputs, batch.targets)
    }
    taken = sum(x.untyped_storage().nbytes() for x in (*activations, *held_out.values()))
    assert (device, stated, others) == ("auto", taken, [])
    assert list(build(gpt2, text, buffer_device="cpu").buffer_bytes()) == ["cpu"]


def test_held_out_batches_are_the_same_at_each_call_and_as_many_as_asked(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    first = list(source.held_out(100))
    source.next()
    assert [batch.tokens for batch in first] == [32, 32, 32, 4]
    assert equal(join(first), join(list(source.held_out(100))))
    assert equal(join(first), join(list(build(gpt2, text).held_out(100))))
    assert equal(join(first).rows(slice(0, 40)), join(list(source.held_out(40))))
    (spec,) = clt_sources()
    other = make_context(gpt2, seed=4)
    config = StreamConfig(text=str(text), context=CONTEXT, model_batch=3, buffer_tokens=320, held_out=0.3)
    assert equal(join(first), join(list(spec.build(config, other).held_out(100))))


@pytest.mark.parametrize("config", [{}, {"pack": False}, {"streaming": True}, {"buffer_tokens": 32, "model_batch": 8}])
def test_a_stream_resumes_bit_for_bit(gpt2: Path, text: Path, config: dict[str, Any]) -> None:
    unbroken = build(gpt2, text, **config)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(unbroken.state()))
        batches.append(unbroken.next())
    assert max(map(len, states)) < 1000
    # 40 documents are 3 blocks, so these places lie in three epochs.
    assert json.loads(states[45])["cursor"]["mark"]["epoch"] > 0
    resumed = build(gpt2, text, **config)
    for stop in (45, 0, 3, 10, 17):
        resumed.load_state(json.loads(states[stop]))
        assert json.dumps(resumed.state()) == states[stop]
        for wanted in batches[stop : stop + 15]:
            assert equal(resumed.next(), wanted)


@pytest.mark.parametrize("model_batch", [2, 5])
def test_two_data_ranks_are_disjoint_and_together_complete(gpt2: Path, text: Path, model_batch: int) -> None:
    alone = build(gpt2, text, {"batch_tokens": 64}, buffer_tokens=640, model_batch=model_batch)
    ranks = [
        build(gpt2, text, {"batch_tokens": 64, "rank": rank, "ranks": 2}, model_batch=model_batch) for rank in (0, 1)
    ]
    for _ in range(3):
        whole = join([alone.next() for _ in range(10)])
        shares = [join([rank.next() for _ in range(10)]) for rank in ranks]
        assert [share.tokens for share in shares] == [320, 320]
        assert ranks[0].state() == ranks[1].state()
        sides = [{tuple(place) for place in share.positions.tolist()} for share in shares]
        assert not sides[0] & sides[1]
        both = join(shares)
        order, wanted = order_of(both), order_of(whole)
        assert equal(both.rows(order), whole.rows(wanted))


def test_the_number_of_contexts_in_a_pass_may_change(gpt2: Path, text: Path) -> None:
    """The rows are the same ones in the same order; only the rounding of a forward pass may differ."""
    started, other = build(gpt2, text, model_batch=5), build(gpt2, text, model_batch=2)
    for _ in range(13):
        started.next()
    other.load_state(json.loads(json.dumps(started.state())))
    for _ in range(25):
        one, two = started.next(), other.next()
        assert torch.equal(one.positions, two.positions)
        assert torch.equal(one.token_ids, two.token_ids)
        # Sums in float32 in another order, of numbers near 1.
        torch.testing.assert_close(one.inputs, two.inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.targets, two.targets, rtol=1e-4, atol=1e-5)


def test_a_batch_mixes_documents(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    assert source.next().positions[:, 0].unique().numel() > 8


def test_epochs_come_in_different_orders(gpt2: Path, text: Path) -> None:
    """A block of exactly one epoch, twice."""
    source = build(gpt2, text)
    rows = source.packer.rows_in_epoch(10**9)
    source = build(gpt2, text, {"batch_tokens": rows}, buffer_tokens=rows)
    one, two = source.next(), source.next()
    assert sorted(one.token_ids.tolist()) == sorted(two.token_ids.tolist())
    assert not torch.equal(one.token_ids, two.token_ids)


def test_another_seed_gives_another_order(gpt2: Path, text: Path) -> None:
    one = build(gpt2, text)
    (spec,) = clt_sources()
    other = make_context(gpt2, seed=4)
    config = StreamConfig(text=str(text), context=CONTEXT, model_batch=3, buffer_tokens=320, held_out=0.3)
    assert not torch.equal(one.next().token_ids, spec.build(config, other).next().token_ids)
