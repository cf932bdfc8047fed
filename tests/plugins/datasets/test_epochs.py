"""`local` hands each row out once per epoch, goes on from a state, and needs no more memory than it states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_datasets.format.chunk import Style, write_chunk
from clt_datasets.format.manifest import default_block_rows, write_manifest
from tests.support.commands import python
from tests.support.stored_data import equal, join, local, make_context, numbered, write_numbered

SIZES = [37, 8, 64, 1, 19, 5, 16]
"""Of chunks, 150 rows in blocks of 8: short blocks in many places."""


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("buffer_tokens", [10, 64, 4096])
def test_an_epoch_has_every_row_once(tmp_path: Path, ranks: int, buffer_tokens: int) -> None:
    chunks = join(write_numbered(tmp_path / "data", SIZES)[:-1])
    sources = [
        local(
            tmp_path / "data",
            make_context(batch_tokens=10 * ranks, rank=rank, ranks=ranks),
            buffer_tokens=buffer_tokens,
        )
        for rank in range(ranks)
    ]
    orders = []
    for _ in range(3):
        # 150 rows are 15, 7.5 and 5 batches of each rank.
        steps = 150 * (2 if ranks == 2 else 1) // (10 * ranks)
        rows = join([source.next() for _ in range(steps) for source in sources])
        found = rows.rows(torch.argsort(rows.token_ids, stable=True))
        assert equal(found, chunks.rows(torch.arange(150).repeat_interleave(len(found.token_ids) // 150)))
        orders.append(rows.token_ids.tolist())
        assert len({json.dumps(source.state()) for source in sources}) == 1
    assert len({tuple(order) for order in orders}) == 3


def test_batches_go_over_the_end_of_an_epoch_without_losing_its_tail(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", SIZES)
    source = local(tmp_path / "data", make_context(batch_tokens=16))
    ids = join([source.next() for _ in range(75)]).token_ids
    assert torch.equal(ids.view(8, 150).sort(1).values, torch.arange(150).expand(8, 150))


def test_a_batch_mixes_chunks(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [200] * 10)
    source = local(tmp_path / "data", make_context(batch_tokens=50), buffer_tokens=400)
    assert all((source.next().token_ids // 200).unique().numel() > 6 for _ in range(20))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_continues_with_the_very_next_row(tmp_path: Path, ranks: int) -> None:
    write_numbered(tmp_path / "data", SIZES)
    for rank in range(ranks):

        def build(rank: int = rank) -> Any:
            return local(tmp_path / "data", make_context(batch_tokens=8 * ranks, rank=rank, ranks=ranks))

        unbroken, states, batches = build(), [], []
        for _ in range(60):
            states.append(json.dumps(unbroken.state()))
            batches.append(unbroken.next())
        assert max(map(len, states)) < 150
        resumed = build()
        for stop in (45, 0, 7, 18, 19, 31):
            resumed.load_state(json.loads(states[stop]))
            assert json.dumps(resumed.state()) == states[stop]
            for wanted in batches[stop : stop + 15]:
                assert equal(resumed.next(), wanted)
        unbroken.close()
        resumed.close()


def test_batches_that_are_kept_do_not_change(tmp_path: Path) -> None:
    """Memory is used again, but not while somebody holds it."""
    write_numbered(tmp_path / "data", SIZES)
    source = local(tmp_path / "data")
    kept = [source.next() for _ in range(20)]
    copies = [b.inputs.clone() for b in kept]
    part = source.next().inputs[3:5].flatten()
    copied = part.clone()
    for _ in range(40):
        source.next()
    assert all(torch.equal(b.inputs, copy) for b, copy in zip(kept, copies, strict=True))
    assert torch.equal(part, copied)


def test_memory_of_batches_is_used_again(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", SIZES)
    source = local(tmp_path / "data")
    addresses = [source.next().inputs.data_ptr() for _ in range(60)]
    assert len(set(addresses)) < 16


@pytest.mark.parametrize(
    ("dtype", "compression"), [("float32", "none"), ("bfloat16", "none"), ("int8", "none"), ("float16", "lz4")]
)
def test_memory_is_what_is_stated_and_gone_when_closed(tmp_path: Path, dtype: str, compression: Any) -> None:
    rows = numbered(3000, layers=8, d_model=256)
    # 32 kB per row and block of 4 MB, as by default.
    style = Style(dtype, compression, default_block_rows(2 * 8 * 256 * 4))
    paths = [tmp_path / f"train_0000{number}.h5" for number in range(3)] + [tmp_path / "held_out_00000.h5"]
    for path in paths:
        write_chunk(path, rows, style, {})
    write_manifest(tmp_path, paths, about={})
    done = python("-m", "tests.support.source_memory", tmp_path, 1000, 4000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] < found["stated"]
    # The buffers are not merely small: nearly all that is stated is used.
    assert found["peak"] > 0.5 * found["stated"]
    assert found["left"] < 64 * 2**20


def test_held_out_rows_are_the_same_at_each_call_and_never_trained_on(tmp_path: Path) -> None:
    truth = write_numbered(tmp_path / "data", SIZES, held_out=45)[-1]
    source = local(tmp_path / "data")
    first = list(source.held_out(40))
    assert [batch.tokens for batch in first] == [16, 16, 8]
    assert equal(join(first), truth.rows(slice(0, 40)))
    trained = join([source.next() for _ in range(20)]).token_ids
    assert equal(join(list(source.held_out(100))), truth)
    assert int(trained.max()) < 1_000_000
    other = local(tmp_path / "data", make_context(rank=1, ranks=2))
    assert all(equal(*pair) for pair in zip(first, other.held_out(40), strict=True)), "the same on any rank"
