"""Chunk files: an HDF5 file of rows, with a checksum for each block of them. A chunk is complete or absent.

`inputs` and `targets` [rows, L, D], `token_ids` [rows] int32, `positions` [rows, 2] int64, `scales` [2, L] float32 (1
except for int8), `moments` and `errors` (see `encode`), `checksums` [blocks + 1] uint64, `state` uint8 (the source's
state after these rows, as JSON). bfloat16 is stored as the uint16 with the same bits. A block's checksum is XXH3-64 of
the bytes of its inputs, targets, ids and positions; the last checksum is that of scales, moments and errors. The
chunk's checksum is XXH3-128 of all of them.

HDF5 makes the file's image in memory, and never writes to the disk: it reports a write that fails late or not at all.
Nor is it asked for anything that a file claims before the claim is compared with the file's size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import attrs
import h5py
import numpy as np
import torch
import xxhash

from clt_datasets.format.encode import encode
from clt_datasets.format.files import digest, write_file
from clt_plugins import Batch, DamagedError, Refused, open_hdf5, parse_json, passing

ARRAYS = ("inputs", "targets", "token_ids", "positions")
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
"""Types in which rows are stored -> NumPy's names of what the files hold."""
GROWTH = 2**24
"""Bytes by which a chunk that is being made grows in memory."""
FILTERS = {"none": frozenset[int](), "lz4": frozenset({32004}), "zstd": frozenset({32015})}
"""The registered numbers of HDF5's filters."""

RowShapes = list[tuple[np.dtype[Any], tuple[int, ...]]]


@attrs.frozen
class Style:
    """How rows are stored."""

    dtype: str
    compression: Literal["none", "lz4", "zstd"]
    block_rows: int


def write_chunk(path: Path, rows: Batch, style: Style, state: dict[str, Any]) -> str:
    """Write a chunk. Needs memory for its rows twice: in the stored type, and as the file's image.

    Args:
        rows: on the CPU.
        state: of the source after these rows; stored in the file, so that a killed generation continues from there.

    Returns:
        The file's XXH3-128, in hexadecimal.

    Raises:
        Refused: an activation is not finite, or does not fit into the type.
        OSError: disk full, no permission; names the file.
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
    # In memory, by HDF5's own driver: with a Python object as the file, garbage collection in another thread crashed.
    with h5py.File(path, "w", driver="core", backing_store=False, block_size=GROWTH, libver="latest") as file:
        for name, array in zip(ARRAYS, arrays, strict=False):
            file.create_dataset(name, data=array, **_filters(style, array))
        file.create_dataset("scales", data=scales)
        file.create_dataset("moments", data=moments)
        file.create_dataset("errors", data=errors)
        file.create_dataset("checksums", data=np.array(sums, "<u8"))
        file.create_dataset("state", data=np.frombuffer(json.dumps(state).encode(), np.uint8))
        for name, value in attrs.asdict(style).items():
            # Text of a fixed length: its size is in the file's header, and can be checked before it is read.
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value
        file.flush()
        written = file.id.get_file_image()
    checksum = xxhash.xxh3_128_hexdigest(written)
    write_file(path, written)
    return checksum


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

    @property
    def row_shapes(self) -> RowShapes:
        """See `row_shapes`."""
        return row_shapes(self.style.dtype, *self.moments.shape[2:], has_tokens=self.has_tokens)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return row_bytes(self.row_shapes)


def row_shapes(dtype: str, n_layers: int, d_model: int, *, has_tokens: bool) -> RowShapes:
    """Type and shape of each array of a row, in the order in which blocks are written, sent and checked."""
    side = np.dtype(DTYPES[dtype]), (n_layers, d_model)
    tokens: RowShapes = [(np.dtype("<i4"), ()), (np.dtype("<i8"), (2,))]
    return [side, side, *(tokens if has_tokens else [])]


def row_bytes(shapes: RowShapes) -> int:
    """Bytes of a row, uncompressed."""
    # Python's own product: NumPy's wraps around where the sizes are absurd.
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)


def read_summary(path: Path) -> Summary:
    """Read all of a chunk except its rows. The file may come from an attacker.

    Raises:
        DamagedError: the file is missing or no chunk, or its summary is not what was written.
        OSError: it cannot be read now (no permission, too many open files); names the file.
    """
    try:
        with open_chunk(path) as file:
            summary = _summary(file)
    except Refused as error:
        raise DamagedError(str(error)) from error
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, RecursionError, AttributeError) as error:
        # The last: a group stands where a dataset should.
        if (now := passing(error, path)) is not None:
            raise now from error
        raise DamagedError(f"{path}: truncated or damaged: {' '.join(str(error).split())}") from error
    summed = digest(*(np.ascontiguousarray(part) for part in (summary.scales, summary.moments, summary.errors)))
    if summed != summary.checksums[-1]:
        raise DamagedError(f"{path}: damaged: the checksum of its summary is wrong")
    if not all(np.isfinite(part).all() for part in (summary.scales, summary.moments, summary.errors)):
        raise DamagedError(f"{path}: damaged: its scales or moments are not finite numbers")
    return summary


def open_chunk(path: Path) -> h5py.File:
    """A chunk's file, which holds nothing but datasets whose rows are all in it; see `open_hdf5`."""
    return open_hdf5(path, FILTERS["lz4"] | FILTERS["zstd"])


def _summary(file: h5py.File) -> Summary:
    """The summary; each size is compared with those of the rows before anything is read."""
    style = Style(*(_attribute(file, name) for name in ("dtype", "compression", "block_rows")))
    if style.dtype not in DTYPES or style.compression not in FILTERS or not 0 < style.block_rows < 2**40:
        raise ValueError(f"rows cannot be stored in this way: {style}")
    rows, *side = file["inputs"].shape
    if len(side) != 2 or not rows:
        raise ValueError(f"'inputs' has the shape {file['inputs'].shape}")
    n_layers, d_model = side
    has_tokens = "token_ids" in file
    compressed = style.compression != "none"
    expected: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...] | None]] = {}
    columns = row_shapes(style.dtype, n_layers, d_model, has_tokens=has_tokens)
    for name, (kind, column) in zip(ARRAYS, columns, strict=False):
        blocks = (min(style.block_rows, rows), *column) if compressed else None
        expected[name] = (rows, *column), kind, blocks
    stored = list(expected)
    expected["scales"] = (2, n_layers), "<f4", None
    expected["moments"] = (2, 2, n_layers, d_model), "<f8", None
    expected["errors"] = (2, n_layers), "<f8", None
    expected["checksums"] = (-(-rows // style.block_rows) + 1,), "<u8", None
    expected["state"] = file["state"].shape, "|u1", None
    arrays = {name: file[name] for name in expected}
    for name, (shape, kind, blocks) in expected.items():
        array = arrays[name]
        filters = FILTERS[style.compression] if blocks else frozenset()
        header = array.id.get_create_plist()
        got = frozenset(header.get_filter(number)[0] for number in range(header.get_nfilters()))
        if array.shape != shape or array.dtype != np.dtype(kind) or array.chunks != blocks or got != filters:
            raise ValueError(f"{name!r} has the shape {array.shape}, expected {shape}, or is stored in another way")
    parts = {name: arrays[name][()] for name in ("checksums", "scales", "moments", "errors")}
    state = parse_json(arrays["state"][()].tobytes())
    if not isinstance(state, dict):
        raise ValueError("'state' is no JSON object")
    offsets = None if compressed else tuple(arrays[name].id.get_offset() for name in stored)
    return Summary(rows, style, **parts, state=state, offsets=offsets, has_tokens=has_tokens)


def _attribute(file: h5py.File, name: str) -> Any:
    """A number, or a text of fixed length."""
    from h5py import h5a, h5t

    header = h5a.open(file.id, name.encode())
    kind = header.get_type()
    known = kind.get_class() == h5t.INTEGER or (kind.get_class() == h5t.STRING and not kind.is_variable_str())
    if not known or kind.get_size() > 64 or math.prod(header.shape) != 1:
        raise ValueError(f"attribute {name!r} is neither a number nor a short text")
    value = file.attrs[name]
    return value.decode() if isinstance(value, bytes) else int(value)
