"""Chunk files: an HDF5 file of rows, with a checksum for each block of them. A chunk is complete or absent.

`inputs` and `targets` [rows, L, D], `token_ids` [rows] int32, `positions` [rows, 2] int64, `scales` [2, L] float32 (1
except for int8), `moments` and `errors` (see `encode`), `checksums` [blocks + 1] uint64. bfloat16 is stored as the
uint16 with the same bits. A block's checksum is XXH3-64 of the bytes of its inputs, targets, ids and positions; the
last checksum is that of scales, moments and errors. The chunk's checksum is XXH3-128 of all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import attrs
import h5py
import numpy as np
import torch
import xxhash

from clt_datasets.format.encode import encode
from clt_datasets.format.files import digest, publish
from clt_plugins import Batch, DamagedError, Refused

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
        state: of the source after these rows; stored in the file, so that a killed generation continues from there.

    Raises:
        Refused: an activation is not finite, or does not fit into the type.
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
    publish(partial, path)


def compression_library() -> Any:
    """`hdf5plugin`; its import adds the filters to HDF5.

    Raises:
        Refused: it is not installed.
    """
    try:
        import hdf5plugin
    except ImportError as error:
        text = "lz4 and zstd need hdf5plugin: python -m pip install 'clt-plugins[compression]'"
        raise Refused("compression", text) from error
    return hdf5plugin


def _filters(style: Style, array: np.ndarray) -> dict[str, Any]:
    if style.compression == "none":
        return {}
    library = compression_library()
    chosen = library.LZ4() if style.compression == "lz4" else library.Zstd(clevel=3)
    return {"chunks": (min(style.block_rows, len(array)), *array.shape[1:]), **chosen}


@attrs.frozen
class Summary:
    """All of a chunk except its rows."""

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
    """The byte of the file at which each array begins; None where they are compressed."""
    has_tokens: bool

    @property
    def checksum(self) -> str:
        """The chunk's checksum, as the manifest lists it."""
        return xxhash.xxh3_128_hexdigest(self.checksums.tobytes())


def read_summary(path: Path) -> Summary:
    """Read all of a chunk except its rows.

    Raises:
        DamagedError: the file is missing or no chunk, or its summary is not what was written.
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
    summary = Summary(rows, style, **parts, state=state, offsets=offsets if plain else None, has_tokens=has_tokens)
    summed = digest(*(np.ascontiguousarray(parts[name]) for name in ("scales", "moments", "errors")))
    if not len(summary.checksums) or summed != summary.checksums[-1]:
        raise DamagedError(f"{path}: damaged: the checksum of its summary is wrong")
    return summary
