"""Data sets of the reference library as a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from clt_crosslayer_coding import SourceConfig, clt_sources
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
    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"metadata\.json: missing"):
            build(tmp_path)

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
