"""Stored rows are the rows of the source: of any type, compressed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Moments
from clt_plugins.model.assemble import build_source
from clt_stream import StreamConfig
from clt_stream import clt_sources as stream_sources
from tests.support.helpers import tables
from tests.support.language_models import make_context as model_context
from tests.support.language_models import save_model, save_text
from tests.support.stored_data import equal, generated, join, local, make_context, write_numbered


def stream_recipe(tmp_path: Path, dtype: str = "float32") -> dict[str, Any]:
    if not (tmp_path / "model").exists():
        save_model(tmp_path / "model")
        save_text(tmp_path / "text.jsonl", 40)
    source = {
        "name": "stream",
        "text": str(tmp_path / "text.jsonl"),
        "context": 24,
        "model_batch": 3,
        "buffer_tokens": 320,
        "held_out": 0.3,
    }
    train = {"steps": 30, "batch_tokens": 32, "eval_tokens": 100}
    return tables(source=source, model={"path": str(tmp_path / "model"), "dtype": dtype, "device": "cpu"}, train=train)


def by_place(batch: Any) -> Any:
    """Rows in the order of the text."""
    return batch.rows(torch.argsort(batch.positions[:, 0] * 1000 + batch.positions[:, 1]))


@pytest.mark.parametrize(
    ("given", "stored", "bound"),
    # Half a unit in the last place: 2^-8 for 8 significant bits, 2^-11 for 11.
    [
        ("float32", "source", 0),
        ("bfloat16", "source", 0),
        ("float32", "bfloat16", 2**-8),
        ("float32", "float16", 2**-11),
    ],
)
def test_local_hands_out_the_rows_of_stream(tmp_path: Path, given: str, stored: str, bound: float) -> None:
    recipe = stream_recipe(tmp_path, given)
    typed = generated(tmp_path / "data", recipe=recipe, dtype=stored, chunk_bytes=100_000, block_rows=16)
    source = build_source(typed)
    wanted = by_place(join([source.next() for _ in range(30)]))
    held_out = join(list(source.held_out(100)))
    read = local(tmp_path / "data", make_context(batch_tokens=32))
    found = by_place(join([read.next() for _ in range(30)]))
    kept = join(list(read.held_out(100)))
    assert len(list((tmp_path / "data").glob("train_*.h5"))) > 3
    for stream_rows, local_rows in ((wanted, found), (held_out, kept)):
        assert torch.equal(stream_rows.token_ids, local_rows.token_ids)
        assert torch.equal(stream_rows.positions, local_rows.positions)
        for side in ("inputs", "targets"):
            exact, got = getattr(stream_rows, side), getattr(local_rows, side)
            assert bool((exact < 0).any())
            if bound == 0:
                assert got.dtype == exact.dtype
                assert torch.equal(got, exact)
            else:
                error = (got.double() - exact.double()).abs()
                # float16 is finer than 2^-24 nowhere.
                assert bool((error <= bound * exact.double().abs() + 2**-24).all())


def test_int8_costs_what_the_manifest_says(tmp_path: Path) -> None:
    typed = generated(tmp_path / "data", recipe=stream_recipe(tmp_path), dtype="int8", block_rows=16)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    source = build_source(typed)
    wanted = by_place(join([source.next() for _ in range(30)]))
    read = local(tmp_path / "data", make_context(batch_tokens=32))
    found = by_place(join([read.next() for _ in range(30)]))
    for side in ("inputs", "targets"):
        exact, got = getattr(wanted, side).double(), getattr(found, side).double()
        error = (got - exact).square().sum((0, 2)) / (exact - exact.mean(0)).square().sum((0, 2))
        torch.testing.assert_close(torch.tensor(manifest["rounding_nmse"][side]).double(), error, rtol=1e-4, atol=0)
        # 254 steps over some 6 standard deviations: (6 / 254)^2 / 12 = 5e-5.
        assert bool((error < 5e-4).all())
        assert bool((error > 1e-6).all())


def test_statistics_are_those_of_the_rows(tmp_path: Path) -> None:
    chunks = write_numbered(tmp_path / "data", [40, 3, 25, 1, 17])
    moments = Moments(2, 3)
    for chunk in chunks[:-1]:
        moments.add(chunk)
    found = local(tmp_path / "data").statistics()
    wanted = moments.statistics()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float64
        # Sums of 86 float64 numbers in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_rows_are_the_same(tmp_path: Path, compression: str) -> None:
    for name, kind in (("plain", "none"), ("small", compression)):
        write_numbered(tmp_path / name, [50, 30], compression=kind, dtype=torch.bfloat16)
    plain, small = (local(tmp_path / name) for name in ("plain", "small"))
    assert plain.next().inputs.dtype == torch.bfloat16
    plain.load_state(local(tmp_path / "plain").state())
    for _ in range(10):
        assert equal(plain.next(), small.next())
    assert equal(join(list(plain.held_out(10))), join(list(small.held_out(10))))


def test_rows_of_a_source_without_tokens(tmp_path: Path) -> None:
    generated(tmp_path / "data")
    assert local(tmp_path / "data").next().token_ids is None


def test_held_out_rows_that_are_read_between_others_change_none(tmp_path: Path) -> None:
    """As `generate` reads them."""
    recipe = stream_recipe(tmp_path)
    (spec,) = stream_sources()
    settings = {k: v for k, v in recipe["source"].items() if k != "name"}
    source, fresh = (spec.build(StreamConfig(**settings), model_context(tmp_path / "model")) for _ in range(2))
    assert source.sites[0] == ("transformer.h.0.mlp.input", "transformer.h.0.mlp.output")
    first = source.next()
    assert sum(batch.tokens for batch in source.held_out(100)) == 100
    assert equal(join([first, *(source.next() for _ in range(12))]), join([fresh.next() for _ in range(13)]))
