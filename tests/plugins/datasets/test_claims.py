"""Manifests, chunks and statistics that claim what they do not have: each is refused by name, without memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load, save

from clt_datasets.format.chunk import read_summary
from clt_datasets.make.inspect import inspect
from clt_plugins import DamagedError, Refused
from tests.support.peak import peak
from tests.support.stored_data import local, write_numbered


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_numbered(tmp_path / "data", [64, 30])
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """None of what is claimed here may be allocated: the smallest is 1 GiB."""
    with peak() as grown:
        yield
        assert grown() < 400e6


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(layers=2**39),
        lambda m: m.update(d_model=2**39),
        lambda m: m.update(layers=2**39, d_model=2**39),
        lambda m: m.update(layers=10**30),
        lambda m: (
            m.update(block_rows=2**39) or m["chunks"][0].update(rows=2**39) or m["tokens"].update(train=2**39 + 30)
        ),
        lambda m: m["chunks"][0].update(rows=2**30) or m["tokens"].update(train=2**30 + 30),
        lambda m: m["chunks"][0].update(bytes=10),
        lambda m: m["rounding_nmse"]["inputs"].__setitem__(0, float("nan")),
        lambda m: m["rounding_nmse"]["inputs"].__setitem__(0, -1.0),
        lambda m: m.update(about={"x": nested(300)}),
        lambda m: m.update(about={"x": nested(900)}),
    ],
)
def test_manifests(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    changed(data / "manifest.json", change)
    with pytest.raises(Refused, match=r"manifest\.json: not the manifest of a data set: [^\n]+$"):
        local(data)


def test_manifests_that_are_no_files(data: Path) -> None:
    os.truncate(data / "manifest.json", 2**36)
    with pytest.raises(Refused, match=r"manifest\.json: larger than"):
        local(data)
    (data / "manifest.json").unlink()
    os.mkfifo(data / "manifest.json")
    with pytest.raises(Refused, match=r"manifest\.json: not a regular file$"):
        local(data)


def replace(file: h5py.File, name: str, **options: Any) -> None:
    del file[name]
    file.create_dataset(name, **options)


def gigabytes_of_checksums(file: h5py.File) -> None:
    replace(file, "checksums", shape=(2**28,), dtype="u8", chunks=(2**20,), compression="gzip")


def checksums_that_are_not_there(file: h5py.File) -> None:
    replace(file, "checksums", shape=(2**28,), dtype="u8")


def gigabytes_of_state(file: h5py.File) -> None:
    replace(file, "state", shape=(2**31,), dtype="u1")


def rows_that_are_not_there(file: h5py.File) -> None:
    replace(file, "inputs", shape=(2**30, 2, 3), dtype="f4")


def other_layers(file: h5py.File) -> None:
    replace(file, "scales", data=np.ones((2, 5), "f4"))


def one_row_more(file: h5py.File) -> None:
    replace(file, "targets", data=np.ones((65, 2, 3), "f4"))


def blocks_of_another_size(file: h5py.File) -> None:
    file.attrs["block_rows"] = 1


def blocks_of_no_rows(file: h5py.File) -> None:
    file.attrs["block_rows"] = 0


def an_attribute_of_any_length(file: h5py.File) -> None:
    file.attrs["dtype"] = "float32"


def a_long_attribute(file: h5py.File) -> None:
    file.attrs["dtype"] = np.bytes_(b"x" * 10_000)


def another_type(file: h5py.File) -> None:
    file.attrs["dtype"] = np.bytes_("float16")


def nested_state(file: h5py.File) -> None:
    replace(file, "state", data=np.frombuffer(b"[" * 200_000, np.uint8))


def moments_without_numbers(file: h5py.File) -> None:
    moments = np.full(file["moments"].shape, np.nan)
    replace(file, "moments", data=moments)
    sums = file["checksums"][()]
    sums[-1] = xxhash.xxh3_64_intdigest(file["scales"][()].tobytes() + moments.tobytes() + file["errors"][()].tobytes())
    replace(file, "checksums", data=sums)


@pytest.mark.parametrize(
    "change",
    [
        gigabytes_of_checksums,
        checksums_that_are_not_there,
        gigabytes_of_state,
        rows_that_are_not_there,
        other_layers,
        one_row_more,
        blocks_of_another_size,
        blocks_of_no_rows,
        an_attribute_of_any_length,
        a_long_attribute,
        another_type,
        nested_state,
        moments_without_numbers,
    ],
    ids=lambda change: change.__name__,
)
def test_chunks(data: Path, change: Callable[[h5py.File], None]) -> None:
    path = data / "train_00000.h5"
    with h5py.File(path, "r+", libver="latest") as file:
        change(file)
    with pytest.raises(DamagedError, match=r"^[^\n]*train_00000\.h5: [^\n]+$"):
        read_summary(path)
    assert any("train_00000.h5: " in fault for fault in inspect(data).faults)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["inputs.mean"].__setitem__((0, 0), torch.nan),
        lambda t: t["inputs.std"].__setitem__((1, 2), torch.inf),
        lambda t: t["targets.rms"].__setitem__(0, -1.0),
        lambda t: t["targets.std"].zero_(),
        lambda t: t.update({"inputs.mean": t["inputs.mean"].to(torch.int64)}),
    ],
)
def test_statistics(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load((data / "statistics.safetensors").read_bytes())
    change(tensors)
    raw = save(tensors)
    (data / "statistics.safetensors").write_bytes(raw)
    changed(data / "manifest.json", lambda m: m.update(statistics=xxhash.xxh3_128_hexdigest(raw)))
    with pytest.raises(DamagedError, match=r"statistics\.safetensors: (inputs|targets)\.\w+ of its statistics is NaN"):
        local(data).statistics()
