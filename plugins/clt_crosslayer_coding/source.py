"""Stored activations of crosslayer-coding as a source.

- `metadata.json`: num_layers, d_model, dtype, total_tokens.
- `chunk_N.h5` or `.hdf5`: `layer_K/inputs` and `layer_K/targets` [rows, D], float32, float16, or uint16 with the bits
  of bfloat16.
- `index.bin`: per chunk (int32 chunk, int32 rows, int64 first row), 16 bytes; or, older, per row (uint32 chunk, uint32
  row), 8 bytes. Both say how many rows a chunk has. The files say so too, and must agree.
- `norm_stats.json`: see `statistics`; may be missing.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clt_crosslayer_coding.identity import file_digest
from clt_crosslayer_coding.statistics import SIDES, read_statistics
from clt_plugins import Batch, DamagedError, Refused, StoredSource, load_json, open_hdf5, passing, read_small

if TYPE_CHECKING:
    from clt_crosslayer_coding import SourceConfig
    from clt_plugins import Context

BLOCK_BYTES = 4 * 2**20
"""About how many bytes are read at a time, if the file does not ask for more."""
LARGEST_BLOCK = 4 * 2**30
"""Bytes that are read at a time at most."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint16": torch.bfloat16}
"""Types of the stored arrays, and of the activations that they hold."""
SIZES = ("num_layers", "d_model", "total_tokens")
PER_CHUNK = np.dtype([("chunk", "<i4"), ("rows", "<i4"), ("first", "<i8")])
PER_ROW = np.dtype([("chunk", "<u4"), ("row", "<u4")])


class CrosslayerStore:
    """A `Store` of such a folder.

    Args:
        held_out: how many of the last rows are held out.

    Raises:
        Refused: the folder is no such data set, or its parts contradict each other.
    """

    has_tokens = False

    def __init__(self, path: Path, held_out: int):
        self.path, self.name = path, str(path)
        metadata = load_json(path / "metadata.json")
        self.n_layers, self.d_model, total = (_size(path / "metadata.json", metadata, name) for name in SIZES)
        self.files = _chunk_files(path)
        headers = {number: _header(file, self.n_layers, self.d_model) for number, file in self.files.items()}
        types = sorted({kind for _, kind, _ in headers.values()})
        if len(types) > 1:
            raise Refused(path, f"its chunks are of different types: {', '.join(types)}")
        self.dtype = DTYPES[types[0]]
        self.numbers = sorted(headers)
        rows = [headers[number][0] for number in self.numbers]
        _check_counts(path, dict(zip(self.numbers, rows, strict=True)), total)
        if held_out >= total:
            raise Refused("source.held_out_tokens", f"{held_out} of {total} tokens leave none to train on")
        row_bytes = 2 * self.n_layers * self.d_model * self.dtype.itemsize
        self.block_rows = _block_rows([unit for *_, unit in headers.values()], row_bytes)
        self.begins: dict[str, list[tuple[int, int]]] = {"train": [], "held_out": []}
        """For each chunk of a part: the chunk's number, and its first row that belongs to the part."""
        self.chunks: Mapping[Any, Sequence[int]] = self._split(rows, total - held_out)
        self.total = total

    @cached_property
    def identity(self) -> str:
        """See `Store.identity`; of the chunk files, in their order, and of where the held-out part begins."""
        parts = [self.block_rows, *self.chunks["train"]]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for number in self.numbers:
            digest.update(file_digest(self.files[number]))
        return f"{self.total} rows in {len(self.files)} files, sha256 {digest.hexdigest()[:32]}"

    def _split(self, rows: list[int], n_train: int) -> dict[str, list[int]]:
        """Split the rows of the chunks into the first ones to train on and the held-out rest: rows of each chunk."""
        chunks: dict[str, list[int]] = {"train": [], "held_out": []}
        for number, count in zip(self.numbers, rows, strict=True):
            train = min(count, n_train)
            n_train -= train
            for part, begin, size in (("train", 0, train), ("held_out", train, count - train)):
                if size:
                    self.begins[part].append((number, begin))
                    chunks[part].append(size)
        return chunks

    def read(self, part: str, chunk: int, begin: int, into: Batch) -> None:
        """See `Store.read`."""
        number, first = self.begins[part][chunk]
        rows = slice(first + begin, first + begin + into.tokens)
        try:
            with open_hdf5(self.files[number]) as file:
                for layer in range(self.n_layers):
                    for side in SIDES:
                        stored = file[f"layer_{layer}/{side}"][rows]
                        if self.dtype == torch.bfloat16:
                            values = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
                        else:
                            values = torch.from_numpy(stored)
                        getattr(into, side)[:, layer] = values
        except (OSError, KeyError, RuntimeError) as error:
            if (now := passing(error, self.files[number])) is not None:
                raise now from error
            text = " ".join(str(error).split())
            raise DamagedError(
                f"{self.files[number]}: chunk {number}, rows {rows.start} to {rows.stop - 1}: cannot be read: {text}"
            ) from error

    def statistics(self) -> Mapping[str, Tensor] | None:
        """Those of norm_stats.json; None if it is missing.

        The library stores means and standard deviations; the root mean square follows from them.
        """
        path = self.path / "norm_stats.json"
        if not path.is_file():
            return None
        statistics = read_statistics(path, self.n_layers, self.d_model)
        for side in SIDES:
            for layer, row in enumerate(statistics[f"{side}.std"]):
                if not bool(row.any()):
                    raise Refused(
                        path,
                        f"{side}.std of layer {layer} is 0 in every dimension; without the file, statistics are "
                        "estimated from the rows",
                    )
            square = statistics[f"{side}.std"].square() + statistics[f"{side}.mean"].square()
            statistics[f"{side}.rms"] = square.mean(-1).sqrt()
        return statistics

    def close(self) -> None:
        """No file stays open between readings."""


def build(config: SourceConfig, context: Context) -> StoredSource:
    """The source.

    Raises:
        Refused: the folder is not there; or see `CrosslayerStore`.
    """
    if not (config.path / "metadata.json").exists():
        why = "no metadata.json in it, so it is no data set of crosslayer-coding"
        if not config.path.exists():
            why = f"no such folder{'' if config.path.is_absolute() else ', nor beside the recipe'}"
        raise Refused("source.path", f"{config.path.resolve()}: {why}: name the folder that the library wrote")
    store = CrosslayerStore(config.path, config.held_out_tokens)
    return StoredSource(store, context, buffer_tokens=config.buffer_tokens, setting="source.path")


def _size(path: Path, metadata: Any, name: str) -> int:
    """A size that metadata.json gives."""
    size = metadata.get(name) if isinstance(metadata, dict) else None
    if type(size) is not int or not 0 < size < 2**40:
        raise Refused(path, f"{name} must be a whole number above 0, got {size!r}")
    return size


def _chunk_files(path: Path) -> dict[int, Path]:
    """Chunk files by number; `.h5` is preferred, as in the library."""
    files: dict[int, Path] = {}
    for ending in ("hdf5", "h5"):
        for file in path.glob(f"chunk_*.{ending}"):
            number = file.stem.removeprefix("chunk_")
            if number.isdigit():
                files[int(number)] = file
    if not files:
        raise Refused(path, "no chunk_N.h5 or chunk_N.hdf5 in it")
    return files


def _block_rows(units: list[int], row_bytes: int) -> int:
    """How many rows to read at a time.

    HDF5 decompresses a chunk of an array as a whole, so each is read once and completely. Chunks that are alike in all
    files, as the library writes them, are those of the largest file.

    Args:
        units: rows that each file's HDF5 chunks have; 1 if any rows can be read alone.
    """
    rows = max(1, min(1024, BLOCK_BYTES // row_bytes))
    unit = max(units)
    parts = -(-unit * row_bytes // LARGEST_BLOCK)
    return -(-unit // parts) * max(1, rows // unit)


def _header(file: Path, n_layers: int, d_model: int) -> tuple[int, str, int]:
    """Rows and type of a chunk, and the rows that are compressed together; all its arrays must be alike."""
    try:
        with open_hdf5(file) as opened:
            if n_layers > len(opened):
                raise Refused(file, f"has {len(opened)} layers, metadata.json says {n_layers}")
            arrays = [opened[f"layer_{layer}/{side}"] for layer in range(n_layers) for side in SIDES]
            kinds = {(array.shape, str(array.dtype)) for array in arrays}
            unit = max(_unit(array) for array in arrays)
    except (OSError, KeyError, AttributeError, RuntimeError) as error:
        if (now := passing(error, file)) is not None:
            raise now from error
        raise Refused(file, f"cannot be read: {' '.join(str(error).split())}") from error
    (shape, dtype), *others = sorted(kinds)
    if others or len(shape) != 2 or shape[1] != d_model:
        raise Refused(file, f"its arrays are not all [rows, {d_model}] of one type: {sorted(kinds)}")
    if dtype not in DTYPES:
        raise Refused(file, f"holds {dtype}, and only float32, float16 and uint16 (bfloat16) can be read")
    return shape[0], dtype, unit


def _unit(array: Any) -> int:
    """How many rows of an array are compressed together; 1 if any can be read alone."""
    if array.chunks is None or not array.id.get_create_plist().get_nfilters():
        return 1
    return max(1, min(array.chunks[0], array.shape[0]))


def _check_counts(path: Path, rows: dict[int, int], total: int) -> None:
    """Compare the rows of the files with the metadata and the index.

    Raises:
        Refused: they differ, or the index is missing.
    """
    if sum(rows.values()) != total:
        raise Refused(path, f"metadata.json counts {total} tokens, the chunk files have {sum(rows.values())}")
    index = path / "index.bin"
    raw = read_small(index, max(PER_CHUNK.itemsize * len(rows), PER_ROW.itemsize * total))
    for kind in (PER_CHUNK, PER_ROW):
        if len(raw) % kind.itemsize:
            continue
        entries = np.frombuffer(raw, kind)
        if kind is PER_CHUNK:
            counted = dict(zip(entries["chunk"].tolist(), entries["rows"].tolist(), strict=True))
        else:
            numbers, counts = np.unique(entries["chunk"], return_counts=True)
            counted = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        if counted == rows:
            return
    raise Refused(index, f"does not list the rows that the chunk files have ({len(rows)} chunks, {total} rows)")
