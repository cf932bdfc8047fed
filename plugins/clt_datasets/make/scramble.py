"""`scramble`: one global shuffle of a data set, out of core.

The first pass deals the rows to buckets, each row to one drawn at random; the second reads bucket after bucket,
shuffles it in memory and writes it as chunks. That every row's bucket is drawn alone, and every bucket's order evenly,
makes all orders of all rows equally likely. Rows that were held out stay so, untouched.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.dataset import DatasetStore, Folder
from clt_datasets.format.chunk import Style, write_chunk
from clt_datasets.format.manifest import MANIFEST, Manifest, replace
from clt_datasets.make.generate import write_manifest
from clt_plugins import Batch, Refused

FILES = 512
"""Buckets, and so files open at a time, at most."""


def scramble(source: Path, out: Path, seed: int, *, memory: int, chunk_bytes: int = 256 * 2**20) -> None:
    """Write the rows of a data set in a random order.

    Args:
        memory: bytes that may be used, about.

    Raises:
        ValueError: `out` is there already; or the data set is too large for the memory.
        DamagedError: a stored row is not what was written.
    """
    store = DatasetStore(Folder(source), str(source))
    if out.exists():
        raise Refused(out, "already there: give another folder")
    row_bytes = _row_bytes(store)
    total = sum(store.chunks["train"])
    # A bucket is read, shuffled into a chunk and encoded: four times in memory, at the most.
    count = max(1, -(-total * row_bytes * 4 // memory))
    if count > FILES:
        raise Refused("--memory-mb", f"{source} needs at least {total * row_bytes * 4 // FILES // 2**20 + 1}")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tqdm(total=2 * total, unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
            _deal(store, partial, seed, count, bar)
            paths = _write(store, partial, seed, count, max(1, min(chunk_bytes, memory // 4) // row_bytes), bar)
        for chunk in store.manifest.part("held_out"):
            shutil.copyfile(source / chunk.file, partial / chunk.file)
            paths.append(partial / chunk.file)
        manifest = store.manifest
        write_manifest(partial, paths, {**manifest.about, "scrambled": {"seed": seed, "data": manifest.identity}})
        _add_rounding(partial, manifest)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{out}: {total:,} tokens in {count} buckets", file=sys.stderr)


def _deal(store: DatasetStore, folder: Path, seed: int, count: int, bar: tqdm) -> None:
    """Append every row to a bucket's file."""
    random = np.random.default_rng([seed, 0])
    files = [(folder / f".bucket_{number}").open("wb") for number in range(count)]
    try:
        for rows in _blocks(store):
            records = _records(rows)
            chosen = random.integers(count, size=len(records))
            for number in np.unique(chosen):
                files[number].write(records[chosen == number].tobytes())
            bar.update(len(records))
    finally:
        for file in files:
            file.close()


def _write(store: DatasetStore, folder: Path, seed: int, count: int, chunk_rows: int, bar: tqdm) -> list[Path]:
    """Write every bucket as chunks."""
    manifest = store.manifest
    style = Style(manifest.dtype, manifest.compression, manifest.block_rows)
    random = np.random.default_rng([seed, 1])
    paths: list[Path] = []
    for number in range(count):
        bucket = folder / f".bucket_{number}"
        records = np.fromfile(bucket, np.uint8).reshape(-1, _row_bytes(store))
        order = random.permutation(len(records))
        for begin in range(0, len(order), chunk_rows):
            paths.append(folder / f"train_{len(paths):05}.h5")
            chosen = order[begin : begin + chunk_rows]
            write_chunk(paths[-1], _rows(store, records[chosen]), style, {})
            bar.update(len(chosen))
        bucket.unlink()
    return paths


def _add_rounding(folder: Path, before: Manifest) -> None:
    """What rounding cost when the rows were first stored stays part of the account."""
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), str(folder))
    sums = {
        side: [a + b for a, b in zip(manifest.rounding_nmse[side], before.rounding_nmse[side], strict=True)]
        for side in manifest.rounding_nmse
    }
    replace(folder / MANIFEST, attrs.evolve(manifest, rounding_nmse=sums).to_json())


def _blocks(store: DatasetStore) -> Iterator[Batch]:
    """All rows to train on, block by block."""
    for chunk, rows in enumerate(store.chunks["train"]):
        for begin in range(0, rows, store.block_rows):
            into = _rows(store, np.empty((min(store.block_rows, rows - begin), _row_bytes(store)), np.uint8))
            store.read("train", chunk, begin, into)
            yield into


def _sizes(store: DatasetStore) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    side = store.dtype, (store.n_layers, store.d_model)
    return [side, side, *([(torch.int64, ()), (torch.int64, (2,))] if store.has_tokens else [])]  # type: ignore[list-item]


def _row_bytes(store: DatasetStore) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in _sizes(store))


def _records(rows: Batch) -> np.ndarray:
    """Each row as bytes, [R, row_bytes]."""
    tensors = [x for x in (rows.inputs, rows.targets, rows.token_ids, rows.positions) if x is not None]
    return np.concatenate([x.reshape(rows.tokens, -1).view(torch.uint8).numpy() for x in tensors], axis=1)


def _rows(store: DatasetStore, records: np.ndarray) -> Batch:
    """Rows of such bytes."""
    tensors, at = [], 0
    for dtype, shape in _sizes(store):
        size = dtype.itemsize * torch.Size(shape).numel()
        column = np.ascontiguousarray(records[:, at : at + size])
        tensors.append(torch.from_numpy(column).view(dtype).reshape(len(records), *shape))
        at += size
    return Batch(*tensors)
