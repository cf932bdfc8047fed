"""What a data set is made of: a manifest, statistics, and chunks of rows with a checksum for each block of them.

    DATASET/
      manifest.json            what the rows are, where they come from, every chunk with its rows and checksum
      statistics.safetensors   inputs.mean, inputs.std [L, D], inputs.rms [L], the same of targets; float64
      train_00000.h5, ...      rows to train on
      held_out_00000.h5, ...   rows never trained on

A chunk is an HDF5 file: `inputs` and `targets` [rows, L, D], `token_ids` [rows] int32, `positions` [rows, 2] int64,
`scales` [2, L] float32 (1 but for int8), `moments` and `errors` (see `encode`), `checksums` [blocks + 1] uint64.
bfloat16 is kept as the uint16 with the same bits. A block's checksum is XXH3-64 of its inputs', targets', ids' and
positions' bytes; the last one is that of scales, moments and errors. A chunk's checksum in the manifest is XXH3-128 of
them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import xxhash

from clt_plugins import Refused

FORMAT = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
"""Types in which rows are stored -> NumPy's names of what the files hold."""
DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHUNK_NAME = re.compile(r"(train|held_out)_\d{5,9}\.h5")
BLOCK_BYTES = 4 * 2**20
"""About how many bytes a block has: enough for a disk's full speed, few enough to mix many blocks in a buffer."""


@attrs.frozen
class Chunk:
    """One file of rows."""

    file: str
    part: Literal["train", "held_out"]
    rows: int
    bytes: int
    """Of the whole file."""
    checksum: str
    """XXH3-128 of its blocks' checksums, hexadecimal."""


@attrs.frozen(kw_only=True)
class Manifest:
    """What `manifest.json` says. It is written last: a data set that has one is whole."""

    layers: int
    d_model: int
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    compression: Literal["none", "lz4", "zstd"]
    block_rows: int
    has_tokens: bool
    """Whether token ids and positions are stored."""
    tokens: dict[str, int]
    """Rows of each part."""
    chunks: tuple[Chunk, ...]
    statistics: str
    """XXH3-128 of the statistics file, hexadecimal."""
    rounding_nmse: dict[str, list[float]]
    """What the stored type costs: squared error over variance, by side and layer."""
    about: dict[str, Any]
    """Where the rows come from: model, sites, source with its text and context, seed."""

    @property
    def identity(self) -> str:
        """Changes with any row."""
        return xxhash.xxh3_128_hexdigest("".join(chunk.checksum for chunk in self.chunks).encode())

    @property
    def row_shapes(self) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of what a row has, in the order in which blocks are written, sent and checked."""
        side = np.dtype(DTYPES[self.dtype]), (self.layers, self.d_model)
        tokens = [(np.dtype("<i4"), ()), (np.dtype("<i8"), (2,))] if self.has_tokens else []
        return [side, side, *tokens]  # type: ignore[list-item]

    @property
    def row_bytes(self) -> int:
        """Of a row, uncompressed."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.row_shapes)

    def part(self, name: str) -> list[Chunk]:
        """The chunks of "train" or "held_out"."""
        return [chunk for chunk in self.chunks if chunk.part == name]

    def block(self, chunk: Chunk, begin: int) -> int:
        """Rows of the block that begins at a row of a chunk.

        Raises:
            ValueError: none does.
        """
        if not 0 <= begin < chunk.rows or begin % self.block_rows:
            raise Refused(chunk.file, f"no block begins at row {begin}")
        return min(self.block_rows, chunk.rows - begin)

    def to_json(self) -> bytes:
        """As the file has it."""
        return (json.dumps({"format": FORMAT, **attrs.asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read what `to_json` wrote, or an attacker.

        Raises:
            ValueError: it is damaged, or written in another format.
        """
        try:
            found = json.loads(data)
            number = found.pop("format")
            if number != FORMAT:
                raise ValueError(f"written in format {number}, this version reads {FORMAT}")
            chunks = tuple(Chunk(**each) for each in found.pop("chunks"))
            manifest = cls(chunks=chunks, **found)
            _check(manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(where, f"not the manifest of a data set: {error}") from error
        return manifest


def _check(manifest: Manifest) -> None:
    """Refuse what no writer writes; sizes and names in it are relied on from here on."""
    sizes = {name: getattr(manifest, name) for name in ("layers", "d_model", "block_rows")}
    sizes |= {f"rows of {chunk.file}": chunk.rows for chunk in manifest.chunks}
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**40:
            raise ValueError(f"{name} is {size!r}")
    if manifest.dtype not in DTYPES or manifest.compression not in ("none", "lz4", "zstd"):
        raise ValueError(f"dtype is {manifest.dtype!r}, compression {manifest.compression!r}")
    for chunk in manifest.chunks:
        match = CHUNK_NAME.fullmatch(chunk.file)
        if match is None or match[1] != chunk.part:
            raise ValueError(f"{chunk.file!r} names no chunk")
        if not isinstance(chunk.checksum, str) or type(chunk.bytes) is not int:
            raise Refused(chunk.file, "checksum or size missing")
    if len({chunk.file for chunk in manifest.chunks}) < len(manifest.chunks):
        raise ValueError("a chunk is listed twice")
    counted = {name: sum(chunk.rows for chunk in manifest.part(name)) for name in ("train", "held_out")}
    if manifest.tokens != counted:
        raise ValueError(f"tokens are {manifest.tokens}, the chunks have {counted}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = any(folder.glob("*_*.h5")) if folder.is_dir() else False
        hint = "its generation has not ended: run `generate` again" if unfinished else "make one with `generate`"
        raise Refused(folder, f"not a data set: no {MANIFEST} in it ({hint})")
    return Manifest.from_json(path.read_bytes(), str(path))


def default_block_rows(row_bytes: int) -> int:
    """How many rows make a block of about `BLOCK_BYTES`."""
    return max(1, min(1024, BLOCK_BYTES // row_bytes))


def digest(*parts: Any) -> int:
    """XXH3-64 of some buffers, one after the other."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
