"""Chunk files: written whole or not at all, read block by block, every block against its checksum.

Uncompressed rows lie in one stretch of the file, so a block is read without HDF5 and by several threads at a time; HDF5
itself reads compressed ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import attrs
import h5py
import numpy as np
import torch
import xxhash

from clt_datasets.format.encode import encode
from clt_datasets.format.manifest import Manifest, digest
from clt_datasets.format.read import read_stretches
from clt_plugins import Batch, DamagedError

ARRAYS = ("inputs", "targets", "token_ids", "positions")


@attrs.frozen
class Style:
    """How rows are stored."""

    dtype: str
    compression: Literal["none", "lz4", "zstd"]
    block_rows: int


def write_chunk(path: Path, rows: Batch, style: Style, state: dict[str, Any]) -> None:
    """Write a chunk.

    Args:
        rows: on the CPU.
        state: of the source after these rows; kept in the file, so that a killed generation goes on from there.

    Raises:
        ValueError: an activation is not finite or does not fit the type.
        OSError: disk full, no permission.
    """
    sides = [encode(rows.inputs, style.dtype), encode(rows.targets, style.dtype)]
    arrays = [side.values for side in sides]
    if rows.token_ids is not None and rows.positions is not None:
        arrays += [rows.token_ids.to(torch.int32).numpy(), rows.positions.numpy()]
    scales, moments, errors = (
        np.stack([getattr(side, name) for side in sides]) for name in ("scale", "moments", "errors")
    )
    sums = [
        digest(*(np.ascontiguousarray(array[begin : begin + style.block_rows]) for array in arrays))
        for begin in range(0, rows.tokens, style.block_rows)
    ]
    sums.append(digest(scales, moments, errors))
    partial = path.with_name(f".{path.name}.partial")
    with h5py.File(partial, "w", libver="latest") as file:
        for name, array in zip(ARRAYS, arrays, strict=False):
            file.create_dataset(name, data=array, **_filters(style, array))
        file.create_dataset("scales", data=scales)
        file.create_dataset("moments", data=moments)
        file.create_dataset("errors", data=errors)
        file.create_dataset("checksums", data=np.array(sums, "<u8"))
        for name, value in attrs.asdict(style).items():
            file.attrs[name] = value
        file.attrs["state"] = json.dumps(state)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def compression_library() -> Any:
    """`hdf5plugin`, whose import teaches HDF5 the filters.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import hdf5plugin
    except ImportError as error:
        raise ValueError("lz4 and zstd need hdf5plugin: python -m pip install 'clt-plugins[compression]'") from error
    return hdf5plugin


def _filters(style: Style, array: np.ndarray) -> dict[str, Any]:
    if style.compression == "none":
        return {}
    library = compression_library()
    chosen = library.LZ4() if style.compression == "lz4" else library.Zstd(clevel=3)
    return {"chunks": (min(style.block_rows, len(array)), *array.shape[1:]), **chosen}


@attrs.frozen
class Summary:
    """What a chunk says of itself."""

    rows: int
    style: Style
    checksums: np.ndarray
    """[blocks + 1] uint64."""
    scales: np.ndarray
    """[2, L] float32."""
    moments: np.ndarray
    """[2, 2, L, D] float64."""
    errors: np.ndarray
    """[2, L] float64."""
    state: dict[str, Any]
    offsets: tuple[int, ...] | None
    """Where each array begins in the file; None where they are compressed."""
    has_tokens: bool

    @property
    def checksum(self) -> str:
        """The chunk's, as the manifest has it."""
        return xxhash.xxh3_128_hexdigest(self.checksums.tobytes())


def read_summary(path: Path) -> Summary:
    """Read all of a chunk but its rows.

    Raises:
        DamagedError: it is missing or no chunk, or its summary is not what was written.
    """
    try:
        with h5py.File(path, "r") as file:
            parts = {name: file[name][()] for name in ("checksums", "scales", "moments", "errors")}
            rows = len(file["inputs"])
            offsets = tuple(file[name].id.get_offset() for name in ARRAYS if name in file)
            plain = all(file[name].chunks is None for name in ARRAYS if name in file)
            has_tokens = "token_ids" in file
            state = json.loads(file.attrs["state"])
            style = Style(file.attrs["dtype"], file.attrs["compression"], int(file.attrs["block_rows"]))
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: missing") from error
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{path}: truncated or damaged: {' '.join(str(error).split())}") from error
    found = Summary(rows, style, **parts, state=state, offsets=offsets if plain else None, has_tokens=has_tokens)
    if digest(*(np.ascontiguousarray(parts[name]) for name in ("scales", "moments", "errors"))) != found.checksums[-1]:
        raise DamagedError(f"{path}: damaged: the checksum of its summary is not the one in the file")
    return found


class ChunkReader:
    """Reads the blocks of one chunk.

    Args:
        page_cache: whether uncompressed rows are read through it.

    Raises:
        DamagedError: the chunk is not the one that the manifest lists.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int, *, page_cache: bool = True):
        self.manifest, self.chunk, self.page_cache = manifest, manifest.chunks[number], page_cache
        self.path, self.number = folder / self.chunk.file, number
        self.summary = read_summary(self.path)
        self._check()

    def _check(self) -> None:
        size = self.path.stat().st_size
        if size != self.chunk.bytes:
            raise DamagedError(f"{self.path}: truncated or changed: {size} bytes, {self.chunk.bytes} when written")
        if self.summary.checksum != self.chunk.checksum or self.summary.rows != self.chunk.rows:
            raise DamagedError(f"{self.path}: damaged, or of another data set: its checksum is not the manifest's")
        if self.summary.offsets is None:
            compression_library()

    def read(self, begin: int, into: list[np.ndarray]) -> None:
        """Read a block into arrays of its rows.

        Args:
            into: contiguous, as `Manifest.row_shapes` says.

        Raises:
            DamagedError: the rows are not those that were written; names file, chunk and rows.
        """
        rows = len(into[0])
        try:
            if self.summary.offsets is None:
                with h5py.File(self.path, "r") as file:
                    for name, array in zip(ARRAYS, into, strict=False):
                        file[name].read_direct(array, np.s_[begin : begin + rows])
            else:
                places = [offset + begin * x[0].nbytes for offset, x in zip(self.summary.offsets, into, strict=True)]
                read_stretches(self.path, list(zip(places, into, strict=True)), page_cache=self.page_cache)
        except (OSError, RuntimeError, KeyError) as error:
            raise self.damaged(begin, rows, f"cannot be read: {' '.join(str(error).split())}") from error
        if digest(*into) != self.checksum(begin):
            raise self.damaged(begin, rows, "damaged: their checksum is not the one that was written")

    def checksum(self, begin: int) -> int:
        """Of the block that begins at a row."""
        return int(self.summary.checksums[begin // self.manifest.block_rows])

    def damaged(self, begin: int, rows: int, what: str) -> DamagedError:
        """An error that names the place."""
        return DamagedError(f"{self.path}: chunk {self.number}, rows {begin} to {begin + rows - 1}: {what}")
