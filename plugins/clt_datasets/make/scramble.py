"""`scramble`: one random order of all rows of a data set, in bounded memory.

The first pass writes each row to a bucket that is drawn at random. The second pass reads bucket after bucket, shuffles
it in memory and writes it as chunks. Since each row's bucket is drawn independently, and each bucket's order uniformly,
all orders of all rows are equally likely. Held-out rows are copied as they are.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.chunk import ARRAYS, Style, write_chunk
from clt_datasets.format.encode import as_numpy
from clt_datasets.format.files import sync
from clt_datasets.format.folder import LocalData
from clt_datasets.format.manifest import write_manifest
from clt_plugins import Batch, Refused

FILES = 512
"""Buckets, and so files open at a time, at most."""
COPIES = 4
"""How often a bucket is in memory at most: read, shuffled, as a chunk, encoded."""


def scramble(source: Path, out: Path, seed: int, *, memory: int, chunk_bytes: int = 256 * 2**20) -> None:
    """Write the rows of a data set in a random order.

    Args:
        memory: bytes that may be used, about.

    Raises:
        Refused: `out` is there already; or the data set is too large for the memory.
        DamagedError: a stored row is not what was written.
    """
    store = DatasetStore(LocalData(source), str(source))
    if out.exists():
        raise Refused(out, "already there: give another folder")
    total, row = sum(store.chunks["train"]), _row(store)
    buckets = max(1, -(-total * row.itemsize * COPIES // memory))
    if buckets > FILES:
        raise Refused("--memory-mb", f"{source} needs at least {total * row.itemsize * COPIES // FILES // 2**20 + 1}")
    chunk_rows = max(1, min(chunk_bytes, memory // COPIES) // row.itemsize)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tqdm(total=2 * total, unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
            _deal(store, partial, seed, buckets, bar)
            paths = _write(store, partial, seed, buckets, chunk_rows, bar)
        for chunk in store.manifest.part("held_out"):
            shutil.copyfile(source / chunk.file, partial / chunk.file)
            paths.append(partial / chunk.file)
        before = store.manifest
        about = {**before.about, "scrambled": {"seed": seed, "data": before.identity}}
        write_manifest(partial, paths, about, rounding_before=before.rounding_nmse)
        partial.rename(out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{out}: {total:,} tokens in {buckets} buckets", file=sys.stderr)


def _deal(store: DatasetStore, folder: Path, seed: int, buckets: int, bar: tqdm) -> None:
    """Append every row to a bucket's file."""
    random = np.random.default_rng([seed, 0])
    files = [(folder / f".bucket_{number}").open("wb") for number in range(buckets)]
    try:
        for records in _blocks(store):
            chosen = random.integers(buckets, size=len(records))
            for number in np.unique(chosen):
                files[number].write(records[chosen == number].tobytes())
            bar.update(len(records))
    finally:
        for file in files:
            file.close()


def _write(store: DatasetStore, folder: Path, seed: int, buckets: int, chunk_rows: int, bar: tqdm) -> list[Path]:
    """Write every bucket as chunks."""
    manifest = store.manifest
    style = Style(manifest.dtype, manifest.compression, manifest.block_rows)
    random = np.random.default_rng([seed, 1])
    paths: list[Path] = []
    for number in range(buckets):
        bucket = folder / f".bucket_{number}"
        records = np.fromfile(bucket, _row(store))
        order = random.permutation(len(records))
        for begin in range(0, len(order), chunk_rows):
            paths.append(folder / f"train_{len(paths):05}.h5")
            chosen = order[begin : begin + chunk_rows]
            write_chunk(paths[-1], _batch(store, records[chosen]), style, {})
            bar.update(len(chosen))
        bucket.unlink()
    return paths


def _row(store: DatasetStore) -> np.dtype:
    """A row in a bucket's file."""
    shape = store.n_layers, store.d_model
    side = as_numpy(torch.empty(0, dtype=store.dtype)).dtype
    tokens = [("token_ids", np.int64), ("positions", np.int64, (2,))] if store.has_tokens else []
    return np.dtype([("inputs", side, shape), ("targets", side, shape), *tokens])


def _blocks(store: DatasetStore) -> Iterator[np.ndarray]:
    """All rows to train on, block by block, as records."""
    row = _row(store)
    for chunk, rows in enumerate(store.chunks["train"]):
        for begin in range(0, rows, store.block_rows):
            records = np.empty(min(store.block_rows, rows - begin), row)
            batch = _batch(store, records)
            store.read("train", chunk, begin, batch)
            for name in records.dtype.names or ():
                records[name] = as_numpy(getattr(batch, name))
            yield records


def _batch(store: DatasetStore, records: np.ndarray) -> Batch:
    """A copy of records as tensors."""
    names = [name for name in ARRAYS if name in (records.dtype.names or ())]
    tensors = [torch.from_numpy(np.ascontiguousarray(records[name])) for name in names]
    return Batch(*(x.view(store.dtype) for x in tensors[:2]), *tensors[2:])
