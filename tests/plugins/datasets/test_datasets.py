"""Stored rows are the rows of the source, and `local` hands each of them out once per epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_datasets.format.chunk import Style, write_chunk
from clt_datasets.format.manifest import default_block_rows, write_manifest
from clt_plugins import DamagedError, Moments
from clt_plugins.model.assemble import build_source
from clt_stream import StreamConfig
from clt_stream import clt_sources as stream_sources
from tests.support.commands import python
from tests.support.helpers import tables
from tests.support.language_models import make_context as model_context
from tests.support.language_models import save_model, save_text
from tests.support.stored_data import equal, generated, join, local, make_context, numbered, write_numbered


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


def take(source: Any, count: int) -> Any:
    """The next batches, joined."""
    return join([source.next() for _ in range(count)])


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


class TestDamage:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        write_numbered(tmp_path / "data", [64, 64])
        return tmp_path / "data"

    def flip(self, path: Path, row: int) -> None:
        """Flip one bit of a row's inputs."""
        import h5py

        with h5py.File(path) as file:
            place = file["inputs"].id.get_offset() + row * 2 * 3 * 4 + 5
        raw = bytearray(path.read_bytes())
        raw[place] ^= 4
        path.write_bytes(raw)

    def test_a_flipped_bit_is_named_and_stops(self, data: Path) -> None:
        self.flip(data / "train_00001.h5", 21)
        source = local(data)
        with pytest.raises(DamagedError, match=r"train_00001\.h5: chunk 1, rows 16 to 23: damaged"):
            take(source, 8)

    def test_or_is_skipped_if_asked(self, data: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.flip(data / "train_00001.h5", 21)
        source = local(data, on_corrupt="skip")
        ids = torch.cat([source.next().token_ids for _ in range(8)])
        bad = set(range(64 + 16, 64 + 24))
        assert set(ids.tolist()) == set(range(128)) - bad
        assert "skipped: " in caplog.text and "train_00001.h5: chunk 1, rows 16 to 23" in caplog.text

    @pytest.mark.parametrize("how", ["missing", "truncated", "swapped"])
    def test_a_chunk_that_is_not_the_one_written(self, data: Path, tmp_path: Path, how: str) -> None:
        path = data / "train_00001.h5"
        if how == "missing":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        else:
            path.write_bytes((data / "train_00000.h5").read_bytes())
        source = local(data)
        with pytest.raises(DamagedError, match=r"train_00001\.h5: "):
            take(source, 8)

    def test_every_bit_of_a_chunk_counts(self, data: Path) -> None:
        """Wherever a bit flips, the rows handed out are right or refused."""
        path = data / "train_00000.h5"
        whole = path.read_bytes()
        unharmed = local(data)
        good = join([unharmed.next() for _ in range(8)])
        refused = 0
        for place in range(3, len(whole), 211):
            raw = bytearray(whole)
            raw[place] ^= 1 << place % 8
            path.write_bytes(raw)
            source = local(data)
            try:
                assert equal(join([source.next() for _ in range(8)]), good)
            except DamagedError:
                refused += 1
            source.close()
        assert refused > 10

    def test_damaged_statistics(self, data: Path) -> None:
        (data / "statistics.safetensors").write_bytes(b"")
        with pytest.raises(DamagedError, match=r"statistics\.safetensors: damaged"):
            local(data).statistics()


class TestBadInput:
    def test_no_data_set(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nowhere: not a data set: no manifest\.json in it \(make one with"):
            local(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": -1},
            {"layers": "2"},
            {"dtype": "float8"},
            {"block_rows": 0},
            {"tokens": {"train": 3, "held_out": 0}},
            {"format": 2},
            {"more": 1},
            {"chunks": [{"file": "../../etc/passwd", "part": "train", "rows": 1, "bytes": 1, "checksum": ""}]},
        ],
    )
    def test_a_manifest_nobody_wrote(self, tmp_path: Path, change: dict[str, Any]) -> None:
        write_numbered(tmp_path / "data", [20])
        path = tmp_path / "data" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of a data set: "):
            local(tmp_path / "data")

    def test_batches_that_do_not_fit(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [20])
        with pytest.raises(ValueError, match=r"^train\.batch_tokens: a batch of 21 tokens is larger than the data"):
            local(tmp_path / "data", make_context(batch_tokens=21))
        with pytest.raises(ValueError, match=r"^source\.buffer_tokens: 4 is less than a batch of 16 tokens$"):
            local(tmp_path / "data", buffer_tokens=4)
        with pytest.raises(ValueError, match=r"^train\.batch_tokens: 16 cannot be divided among 3 data ranks$"):
            local(tmp_path / "data", make_context(ranks=3))

    def test_nothing_held_out(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [20], held_out=0)
        with pytest.raises(ValueError, match=r"holds no held-out tokens"):
            local(tmp_path / "data")

    def test_a_state_of_other_data(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "one", [20])
        write_numbered(tmp_path / "two", [21])
        with pytest.raises(ValueError, match=r"^source\.path: not the data that the state was saved with"):
            local(tmp_path / "two").load_state(local(tmp_path / "one").state())

    def test_values_a_type_cannot_hold(self, tmp_path: Path) -> None:
        from clt_datasets.format.encode import encode

        x = torch.tensor([[[1.0, 70000.0]]])
        with pytest.raises(ValueError, match=r"^--dtype: activations reach 70000, which float16 cannot hold"):
            encode(x, "float16")
        with pytest.raises(ValueError, match=r"^source: an activation of layer 0 is not a finite number: try"):
            encode(x * torch.inf, "float32")


def test_stream_is_unchanged_by_generating(tmp_path: Path) -> None:
    """Held-out rows are read between the others."""
    recipe = stream_recipe(tmp_path)
    (spec,) = stream_sources()
    settings = {k: v for k, v in recipe["source"].items() if k != "name"}
    source = spec.build(StreamConfig(**settings), model_context(tmp_path / "model"))
    assert source.sites[0] == ("transformer.h.0.mlp.input", "transformer.h.0.mlp.output")
