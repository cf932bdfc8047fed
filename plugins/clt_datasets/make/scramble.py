"""`scramble`: one random order of all rows of a data set, in bounded memory.

The first pass writes each row to a bucket that is drawn at random. The second pass reads bucket after bucket, shuffles
it in memory and writes it as chunks. Since each row's bucket is drawn independently, and each bucket's order uniformly,
all orders of all rows are equally likely. Held-out rows are copied as they are, and checked.

The data set is written under a temporary name. It gets its own when all of it is on the disk.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from clt_datasets.dataset import DatasetStore
from clt_datasets.format.chunk import ARRAYS, Style, write_chunk
from clt_datasets.format.encode import as_numpy
from clt_datasets.format.files import append, file_pieces, naming, sync, write_pieces
from clt_datasets.format.folder import ChunkReader, LocalData
from clt_datasets.format.manifest import write_manifest
from clt_plugins import Batch, DamagedError, Lock, Refused

BUCKETS = 512
"""Buckets at most: each gets a write of its own for every block that is read."""
COPIES = 5
"""How often a bucket is in memory at most: read, shuffled, as a chunk, encoded, as the image of its file."""


def scramble(source: Path, out: Path, seed: int, *, memory: int, chunk_bytes: int = 256 * 2**20) -> None:
    """Write the rows of a data set in a random order.

    Args:
        memory: bytes that may be used, about.

    Raises:
        Refused: `out` is there already, or being written; or the data set is too large for the memory.
        DamagedError: a stored row is not what was written.
        OSError: a file could not be written; names it. Nothing is left.
    """
    store = DatasetStore(LocalData(source), str(source))
    if out.exists():
        raise Refused(out, "already there: give another folder")
    total, row = sum(store.chunks["train"]), _row(store)
    buckets = max(1, -(-total * row.itemsize * COPIES // memory))
    if buckets > BUCKETS:
        raise Refused("--memory-mb", f"{source} needs at least {total * row.itemsize * COPIES // BUCKETS // 2**20 + 1}")
    chunk_rows = max(1, min(chunk_bytes, memory // COPIES) // row.itemsize)
    with _alone(out), _partial(out) as partial:
        with tqdm(total=2 * total, unit="tok", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
            digests = _deal(store, partial, seed, buckets, bar)
            paths = _write(store, partial, seed, digests, chunk_rows, bar)
        before = store.manifest
        for number, chunk in enumerate(before.chunks):
            if chunk.part == "held_out":
                paths.append(partial / chunk.file)
                write_pieces(paths[-1], file_pieces(source / chunk.file))
                # The copy is read, so that what is published was checked.
                ChunkReader(paths[-1], before, number).verify()
        about = {**before.about, "scrambled": {"seed": seed, "data": before.identity}}
        write_manifest(partial, paths, about, rounding_before=before.rounding_nmse)
    print(f"{out}: {total:,} tokens in {buckets} buckets", file=sys.stderr)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same data set."""
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(out.with_name(f".{out.name}.lock"))
    holder = lock.try_acquire()
    if holder is not None:
        raise Refused(out, f"another `scramble` writes it ({holder}): wait until it has ended, or stop it")
    try:
        if out.exists():
            raise Refused(out, "already there: give another folder")
        yield
    finally:
        lock.release()


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end; after an error nothing is left of it."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(out):
            partial.mkdir()
        yield partial
        with naming(out):
            partial.rename(out)
            try:
                sync(out.parent)
            except OSError:
                # A crash could take the name away: it is not there yet.
                out.rename(partial)
                raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _bucket(folder: Path, number: int) -> Path:
    return folder / f".bucket_{number}"


def _deal(store: DatasetStore, folder: Path, seed: int, buckets: int, bar: tqdm) -> list[xxhash.xxh3_128]:
    """Append every row to a bucket's file. Returns each file's digest."""
    random = np.random.default_rng([seed, 0])
    digests = [xxhash.xxh3_128() for _ in range(buckets)]
    for number in range(buckets):
        append(_bucket(folder, number), b"")
    for records in _blocks(store):
        chosen = random.integers(buckets, size=len(records))
        for number in np.unique(chosen):
            piece = records[chosen == number].tobytes()
            digests[number].update(piece)
            # Opened each time: a process may hold only so many files open, on some systems fewer than buckets.
            append(_bucket(folder, number), piece)
        bar.update(len(records))
    return digests


def _write(
    store: DatasetStore, folder: Path, seed: int, digests: list[xxhash.xxh3_128], chunk_rows: int, bar: tqdm
) -> list[Path]:
    """Write every bucket as chunks."""
    manifest = store.manifest
    style = Style(manifest.dtype, manifest.compression, manifest.block_rows)
    random = np.random.default_rng([seed, 1])
    paths: list[Path] = []
    for number, digest in enumerate(digests):
        bucket = _bucket(folder, number)
        with naming(bucket, "read"):
            records = np.fromfile(bucket, _row(store))
        if xxhash.xxh3_128_digest(records.view(np.uint8).data) != digest.digest():
            raise DamagedError(f"{bucket}: not what was written into it")
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
