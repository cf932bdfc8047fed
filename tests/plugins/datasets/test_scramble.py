"""`scramble` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_datasets.make.inspect import as_text, inspect
from clt_datasets.make.scramble import scramble
from tests.support.stored_data import equal, generated, join, local, make_context, write_numbered


def stored_order(folder: Path) -> Any:
    """The rows to train on as they lie in the files."""
    source = local(folder, make_context(batch_tokens=1))
    store = source.store
    rows = []
    for chunk, count in enumerate(store.chunks["train"]):
        for begin in range(0, count, store.block_rows):
            size = min(store.block_rows, count - begin)
            batch = source.next().rows(torch.zeros(size, dtype=torch.int64))
            store.read("train", chunk, begin, batch)
            rows.append(batch)
    return join(rows)


# 2,000 rows of 72 bytes: as one bucket, and as thirty.
@pytest.mark.parametrize("memory", [10**7, 20_000])
def test_a_scrambled_data_set_has_the_same_rows_in_another_order(tmp_path: Path, memory: int) -> None:
    chunks = write_numbered(tmp_path / "data", [700, 1, 299, 1000])
    scramble(tmp_path / "data", tmp_path / "out", 1, memory=memory)
    scramble(tmp_path / "data", tmp_path / "again", 1, memory=memory)
    scramble(tmp_path / "data", tmp_path / "other", 2, memory=memory)
    rows = stored_order(tmp_path / "out")
    assert equal(rows.rows(torch.argsort(rows.token_ids)), join(chunks[:-1]))
    assert equal(rows, stored_order(tmp_path / "again"))
    ids, others = rows.token_ids, stored_order(tmp_path / "other").token_ids
    assert not torch.equal(ids, others)
    # The correlation of a random order with the old one is 0 +- 1 / sqrt(2000).
    for order in (ids, others):
        correlation = torch.corrcoef(torch.stack([order.double(), torch.arange(2000).double()]))[0, 1]
        assert abs(float(correlation)) < 0.1
        # Every stretch of 200 has rows of all tenths: 20 of each expected, +- 4.
        counts = torch.stack([torch.bincount(part // 200, minlength=10) for part in order.split(200)])
        assert int(counts.min()) > 2 and int(counts.max()) < 45
    assert equal(join(list(local(tmp_path / "out").held_out(10))), chunks[-1])
    assert inspect(tmp_path / "out", verify=True).faults == []


def test_scrambled_int8_rows_are_near_and_the_account_of_rounding_goes_on(tmp_path: Path) -> None:
    generated(tmp_path / "data", dtype="int8")
    scramble(tmp_path / "data", tmp_path / "out", 0, memory=10**7)
    before, after = (inspect(tmp_path / name).rounding_nmse["inputs"] for name in ("data", "out"))
    assert all(0 < a <= b < 3 * a for a, b in zip(before, after, strict=True))


def test_scramble_refuses_what_is_there_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [700])
    with pytest.raises(ValueError, match=r"data: already there: give another folder$"):
        scramble(tmp_path / "data", tmp_path / "data", 0, memory=10**7)
    with pytest.raises(ValueError, match=r"^--memory-mb: .*data needs at least 1$"):
        scramble(tmp_path / "data", tmp_path / "out", 0, memory=100)
    path = tmp_path / "data" / "train_00000.h5"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(OSError, match="truncated"):
        scramble(tmp_path / "data", tmp_path / "out", 0, memory=10**7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_inspect_shows_counts_statistics_and_rows(tmp_path: Path, clt: Any) -> None:
    chunks = write_numbered(tmp_path / "data", [40, 25])
    done = clt("inspect", "data", "--verify", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == {"train": 65, "held_out": 10}
    assert (found["layers"], found["d_model"], found["dtype"], found["chunks"]) == (2, 3, "float32", 3)
    assert found["bytes_per_token"] == 2 * 2 * 3 * 4 + 4 + 16
    assert found["verified"] == "all rows" and found["faults"] == []
    rms = join(chunks[:-1]).targets.double().square().mean((0, 2)).sqrt()
    torch.testing.assert_close(torch.tensor(found["statistics"]["targets.rms"]).double(), rms, rtol=1e-6, atol=0)
    assert [row["token_id"] for row in found["preview"]] == [0, 1, 2, 3]
    norm = chunks[0].targets[1].norm(dim=-1).tolist()
    assert found["preview"][1]["targets_norm"] == pytest.approx(norm)


def test_inspect_names_every_fault(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", [64, 64, 64], d_model=64)
    for name in ("train_00000.h5", "train_00002.h5"):
        path = tmp_path / "data" / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 4] ^= 1
        path.write_bytes(raw)
    (tmp_path / "data" / "train_00001.h5").unlink()
    (tmp_path / "data" / "statistics.safetensors").unlink()
    quick, whole = (inspect(tmp_path / "data", verify=verify) for verify in (False, True))
    assert len(quick.faults) == 2
    assert len(whole.faults) == 4
    text = as_text(whole)
    for name in ("train_00000.h5: chunk 0, rows", "train_00001.h5: missing", "statistics.safetensors: missing"):
        assert name in text
    assert text.endswith("checked: all rows; 4 faults")
