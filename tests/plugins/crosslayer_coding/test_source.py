"""Data sets of crosslayer-coding as a source."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from clt_crosslayer_coding import SourceConfig, clt_sources
from clt_plugins import Refused
from tests.support.crosslayer_coding import write
from tests.support.stored_data import join, make_context


def build(folder: Path, **config: Any) -> Any:
    (spec,) = clt_sources()
    settings = {"held_out_tokens": 30, "buffer_tokens": 32} | config
    return spec.build(SourceConfig(path=folder, **settings), make_context(batch_tokens=19))


@pytest.mark.parametrize("index", ["per chunk", "per row"])
@pytest.mark.parametrize("ending", ["h5", "hdf5"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
def test_every_row_is_read_once(tmp_path: Path, index: str, ending: str, dtype: str) -> None:
    truth = write(tmp_path / "data", index=index, ending=ending, dtype=dtype)
    source = build(tmp_path / "data")
    assert (source.n_layers, source.d_model) == (11, 4)
    # 95 rows to train on are 5 batches of 19.
    rows = join([source.next() for _ in range(5)])
    assert rows.inputs.dtype == truth.inputs.dtype
    assert bool((truth.inputs < 0).any())
    for side in ("inputs", "targets"):
        found, wanted = (getattr(batch, side).float().flatten(1) for batch in (rows, truth))
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted[:95].tolist()))
    # A row's inputs and targets stay together.
    pairs = {
        tuple(a): tuple(b) for a, b in zip(truth.inputs[:, 0].tolist(), truth.targets[:, 10].tolist(), strict=True)
    }
    assert all(
        pairs[tuple(a)] == tuple(b)
        for a, b in zip(rows.inputs[:, 0].tolist(), rows.targets[:, 10].tolist(), strict=True)
    )
    held_out = join(list(source.held_out(100)))
    assert torch.equal(held_out.inputs, truth.inputs[95:])
    assert torch.equal(held_out.targets, truth.targets[95:])
    source.close()


def test_statistics_are_the_librarys(tmp_path: Path) -> None:
    truth = write(tmp_path / "data")
    found = build(tmp_path / "data").statistics()
    torch.testing.assert_close(found["targets.mean"], truth.targets.double().mean(0))
    torch.testing.assert_close(found["inputs.std"], truth.inputs.double().std(0))
    # The library's deviations are over n - 1, so 1 / 125 of the variance is too much.
    rms = truth.inputs.double().square().mean((0, 2)).sqrt()
    torch.testing.assert_close(found["inputs.rms"], rms, rtol=0.005, atol=0)
    (tmp_path / "data" / "norm_stats.json").unlink()
    assert build(tmp_path / "data").statistics() is None


def test_a_state_continues_with_the_very_next_row(tmp_path: Path) -> None:
    write(tmp_path / "data")
    source, resumed = build(tmp_path / "data"), build(tmp_path / "data")
    for _ in range(8):
        source.next()
    resumed.load_state(json.loads(json.dumps(source.state())))
    for _ in range(4):
        assert torch.equal(source.next().inputs, resumed.next().inputs)


class TestBadInput:
    def test_an_index_of_other_data(self, tmp_path: Path) -> None:
        write(tmp_path / "data")
        (tmp_path / "data" / "index.bin").write_bytes(b"\0" * 32)
        with pytest.raises(
            ValueError, match=r"index\.bin: does not list the rows that the chunk files have \(3 chunks"
        ):
            build(tmp_path / "data")

    def test_a_missing_chunk(self, tmp_path: Path) -> None:
        write(tmp_path / "data")
        (tmp_path / "data" / "chunk_1.hdf5").unlink()
        with pytest.raises(ValueError, match=r"metadata\.json counts 125 tokens, the chunk files have 100$"):
            build(tmp_path / "data")

    def test_a_truncated_chunk(self, tmp_path: Path) -> None:
        write(tmp_path / "data")
        path = tmp_path / "data" / "chunk_1.hdf5"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"chunk_1\.hdf5: cannot be read: "):
            build(tmp_path / "data")

    def test_a_folder_that_is_not_there_or_holds_other_things(self, tmp_path: Path) -> None:
        for path, why in ((tmp_path / "none", "no such folder"), (tmp_path, r"no metadata\.json in it")):
            with pytest.raises(ValueError, match=rf"^source\.path: {path}: {why}.*: name the folder that the library"):
                build(path)

    def test_nothing_left_to_train_on(self, tmp_path: Path) -> None:
        write(tmp_path / "data")
        with pytest.raises(ValueError, match=r"^source\.held_out_tokens: 125 of 125 tokens leave none to train on$"):
            build(tmp_path / "data", held_out_tokens=125)

    @pytest.mark.parametrize(
        ("name", "change", "text"),
        [
            ("metadata.json", lambda m: m.update(num_layers=10**9), "has 11 layers, metadata.json says 1000000000"),
            ("metadata.json", lambda m: m.update(d_model=True), "d_model must be a whole number above 0, got True"),
            ("metadata.json", lambda m: m.pop("total_tokens"), "total_tokens must be a whole number above 0, got None"),
            ("metadata.json", lambda m: m.update(num_layers=float("nan")), "metadata.json: .*NaN is not JSON"),
        ],
    )
    def test_absurd_sizes(self, tmp_path: Path, name: str, change: Any, text: str) -> None:
        write(tmp_path / "data")
        table = json.loads((tmp_path / "data" / name).read_text())
        change(table)
        (tmp_path / "data" / name).write_text(json.dumps(table))
        with pytest.raises(ValueError, match=text):
            build(tmp_path / "data")

    @pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0])
    def test_statistics_that_no_activations_have(self, tmp_path: Path, value: float) -> None:
        write(tmp_path / "data")
        path = tmp_path / "data" / "norm_stats.json"
        table = json.loads(path.read_text())
        table["3"]["inputs"]["std"] = [value] * 4
        path.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=r"norm_stats\.json: "):
            build(tmp_path / "data").statistics()

    def test_files_that_lead_elsewhere(self, tmp_path: Path) -> None:
        """A virtual data set whose source is missing would be zeros."""
        write(tmp_path / "data")
        with h5py.File(tmp_path / "data" / "chunk_1.hdf5", "r+") as file:
            shape = file["layer_3/inputs"].shape
            del file["layer_3/inputs"]
            layout = h5py.VirtualLayout(shape=shape, dtype="f4")
            layout[:] = h5py.VirtualSource("nowhere.h5", "x", shape=shape)
            file.create_virtual_dataset("layer_3/inputs", layout)
        with pytest.raises(ValueError, match=r"chunk_1\.hdf5: /layer_3/inputs is a virtual dataset"):
            build(tmp_path / "data")


class TestIdentity:
    def test_a_copy_elsewhere_is_the_same_data(self, tmp_path: Path) -> None:
        write(tmp_path / "data")
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        build(tmp_path / "copy").load_state(build(tmp_path / "data").state())

    @pytest.mark.parametrize("change", ["values", "files swapped", "held out"])
    def test_other_data_are_refused(self, tmp_path: Path, change: str) -> None:
        write(tmp_path / "data", (60, 60))
        state = build(tmp_path / "data").state()
        one, two = (tmp_path / "data" / f"chunk_{number}.hdf5" for number in (0, 1))
        if change == "values":
            with h5py.File(one, "r+") as file:
                file["layer_3/inputs"][17, 2] += 1
        elif change == "files swapped":
            kept = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(kept)
        source = build(tmp_path / "data", held_out_tokens=31 if change == "held out" else 30)
        with pytest.raises(Refused, match=r"^source\.path: not the data that the state was saved with"):
            source.load_state(state)


class TestReading:
    """HDF5 decompresses a chunk of an array as a whole, so it must be asked for each chunk once."""

    @pytest.fixture
    def decompressed(self, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str, int], int]:
        """How often each compressed chunk was needed: (file, array, number) -> reads."""
        counts: dict[tuple[str, str, int], int] = {}
        real, lock = h5py.Dataset.__getitem__, threading.Lock()

        def counting(array: h5py.Dataset, rows: slice, *rest: Any) -> Any:
            size = array.chunks[0]
            for number in range(rows.start // size, -(-rows.stop // size)):
                key = (array.file.filename, array.name, number)
                with lock:  # several threads read
                    counts[key] = counts.get(key, 0) + 1
            return real(array, rows, *rest)

        monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
        # Of a real data set, about 4 MiB are some hundred rows, less than a chunk; here, eight rows.
        monkeypatch.setattr("clt_crosslayer_coding.source.BLOCK_BYTES", 8 * 2 * 11 * 4 * 4)
        return counts

    @pytest.mark.parametrize("buffer_tokens", [19, 32, 200, 5000])
    def test_a_compressed_chunk_is_read_once_per_epoch(
        self, tmp_path: Path, decompressed: dict[tuple[str, str, int], int], buffer_tokens: int
    ) -> None:
        """Whatever the buffer; files of many chunks and of one, and a short chunk at the end of each."""
        truth = write(tmp_path / "data", (530, 100, 37), chunk_rows=100)
        source = build(tmp_path / "data", held_out_tokens=37, buffer_tokens=buffer_tokens)
        # 630 rows to train on; the group after the epoch is read ahead, so that of the chunks some are read again.
        rows = join([source.next() for _ in range(33)])
        source.close()
        values = rows.inputs[:, 0].tolist()
        assert len({tuple(row) for row in values}) == len(values) == 627
        assert {tuple(row) for row in values} <= {tuple(row) for row in truth.inputs[:, 0].tolist()}
        arrays = 2 * 11
        assert len(decompressed) == 7 * arrays
        # What was read ahead of the second epoch: two buffers, and what batches need of them.
        ahead = sum(decompressed.values()) - 7 * arrays
        assert ahead <= arrays * (3 + 3 * min(buffer_tokens, 630) // 100)

    def test_ten_epochs_read_ten_times_the_data(
        self, tmp_path: Path, decompressed: dict[tuple[str, str, int], int]
    ) -> None:
        write(tmp_path / "data", (530, 100, 37), chunk_rows=100)
        source = build(tmp_path / "data", held_out_tokens=37, buffer_tokens=100)
        for _ in range(10 * 630 // 19):
            source.next()
        source.close()
        # 1 chunk in 70 more for what is read ahead at the end.
        assert 1.0 <= sum(decompressed.values()) / (10 * 7 * 22) < 1.06

    def test_other_arrays_are_read_in_small_blocks(self, tmp_path: Path) -> None:
        write(tmp_path / "data", (5000, 600), chunk_rows=4000, compression=None)
        assert build(tmp_path / "data").store.block_rows == 1024
        write(tmp_path / "small", (5000, 600), chunk_rows=48)
        assert build(tmp_path / "small").store.block_rows == 1008
