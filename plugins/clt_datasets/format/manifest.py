"""What a data set consists of: a manifest, statistics, and chunks of rows.

    DATASET/
      manifest.json            what the rows are, where they come from, every chunk with its rows and checksum
      statistics.safetensors   inputs.mean, inputs.std [L, D], inputs.rms [L], the same of targets; float64
      train_00000.h5, ...      rows to train on; see `chunk`
      held_out_00000.h5, ...   rows never trained on

The manifest is written last: a data set that has one is complete.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import cattrs
import xxhash
from attrs import field, validators
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from clt_datasets.format.chunk import RowShapes, read_summary, row_bytes, row_shapes
from clt_datasets.format.files import write_file
from clt_datasets.format.statistics import SIDES, Totals
from clt_plugins import DamagedError, Refused, parse_json, read_small

FORMAT = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHUNK_NAME = re.compile(r"(train|held_out)_[0-9]{5,9}\.h5")
BLOCK_BYTES = 4 * 2**20
"""About how many bytes a block has: enough for a disk's full speed, few enough to mix many blocks in a buffer."""
LARGEST_BLOCK = 2**30
"""Bytes of a block at most; a reader holds several in memory."""

DEEPEST = 50
"""Levels of `about` at most."""

Part = Literal["train", "held_out"]
_size = validators.and_(validators.ge(1), validators.lt(2**40))
_checksum = validators.matches_re(r"[0-9a-f]{32}")


@attrs.frozen
class Chunk:
    """One file of rows."""

    file: str = field()
    part: Part
    rows: int = field(validator=_size)
    bytes: int = field(validator=_size)
    """Of the whole file."""
    checksum: str = field(validator=_checksum)
    """XXH3-128 of its blocks' checksums, hexadecimal."""

    @file.validator
    def _names_a_chunk(self, _: Any, file: str) -> None:
        match = CHUNK_NAME.fullmatch(file)
        if match is None or match[1] != self.part:
            raise ValueError(f"{file!r} is not the name of a {self.part} chunk")


@attrs.frozen(kw_only=True)
class Manifest:
    """What `manifest.json` says."""

    n_layers: int = field(validator=_size)
    """`layers` in the file."""
    d_model: int = field(validator=_size)
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    compression: Literal["none", "lz4", "zstd"]
    block_rows: int = field(validator=_size)
    has_tokens: bool
    """Whether token ids and positions are stored."""
    tokens: dict[str, int] = field()
    """Rows of each part."""
    chunks: tuple[Chunk, ...] = field()
    statistics: str = field(validator=_checksum)
    """XXH3-128 of the statistics file, hexadecimal."""
    rounding_nmse: dict[str, list[float]] = field()
    """What the stored type costs: squared error over variance, by side and layer."""
    about: dict[str, Any] = field()
    """Where the rows come from: model, sites, source with its text and context, what they were made of, seed."""

    def __attrs_post_init__(self) -> None:
        # Before anything is allocated for rows: their sizes must fit to those of the files, which are checked later.
        if self.largest_block > LARGEST_BLOCK:
            raise ValueError(f"a block of {self.block_rows} rows has more than {LARGEST_BLOCK:,} bytes")
        for chunk in self.chunks if self.compression == "none" else ():
            if chunk.bytes < chunk.rows * self.row_bytes:
                raise ValueError(f"{chunk.file!r} of {chunk.bytes} bytes cannot hold {chunk.rows} rows")

    @chunks.validator
    def _differ(self, _: Any, chunks: tuple[Chunk, ...]) -> None:
        if len({chunk.file for chunk in chunks}) < len(chunks):
            raise ValueError("a chunk is listed twice")

    @tokens.validator
    def _are_those_of_the_chunks(self, _: Any, tokens: dict[str, int]) -> None:
        counted = {name: sum(chunk.rows for chunk in self.part(name)) for name in get_args(Part)}
        if tokens != counted:
            raise ValueError(f"tokens are {tokens}, the chunks have {counted}")
        if not counted["train"]:
            raise ValueError("it has no tokens to train on")

    @rounding_nmse.validator
    def _has_every_layer(self, _: Any, nmse: dict[str, list[float]]) -> None:
        if {side: len(values) for side, values in nmse.items()} != dict.fromkeys(SIDES, self.n_layers):
            raise ValueError(f"rounding_nmse needs {self.n_layers} numbers for each of {', '.join(SIDES)}")
        if not all(0 <= value < math.inf for values in nmse.values() for value in values):
            raise ValueError("rounding_nmse holds numbers that are negative or not finite")

    @about.validator
    def _is_flat(self, _: Any, about: dict[str, Any]) -> None:
        # JSON is written by a function that calls itself for every level.
        level: list[Any] = [about]
        for _depth in range(DEEPEST):
            level = [value for table in level for value in (table.values() if isinstance(table, dict) else table)]
            level = [value for value in level if isinstance(value, (dict, list))]
        if level:
            raise ValueError(f"'about' is nested more than {DEEPEST} deep")

    @property
    def identity(self) -> str:
        """Changes with any row."""
        return xxhash.xxh3_128_hexdigest("".join(chunk.checksum for chunk in self.chunks).encode())

    @property
    def row_shapes(self) -> RowShapes:
        """See `row_shapes`."""
        return row_shapes(self.dtype, self.n_layers, self.d_model, has_tokens=self.has_tokens)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, uncompressed."""
        return row_bytes(self.row_shapes)

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block."""
        return min(self.block_rows, max(chunk.rows for chunk in self.chunks)) * self.row_bytes

    def part(self, name: str) -> list[Chunk]:
        """The chunks of "train" or "held_out"."""
        return [chunk for chunk in self.chunks if chunk.part == name]

    def block(self, chunk: Chunk, begin: int) -> int:
        """Rows of the block that begins at row `begin` of a chunk.

        Raises:
            Refused: no block begins there.
        """
        if not 0 <= begin < chunk.rows or begin % self.block_rows:
            raise Refused(chunk.file, f"no block begins at row {begin}")
        return min(self.block_rows, chunk.rows - begin)

    def to_json(self) -> bytes:
        """The content of the file."""
        return (json.dumps({"format": FORMAT, **_converter.unstructure(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read what `to_json` wrote; `data` may come from an attacker.

        Raises:
            Refused: it is damaged, or in another format.
        """
        try:
            tables = parse_json(data)
            if not isinstance(tables, dict):
                raise ValueError("expected a JSON object")
            number = tables.pop("format", None)
            if number != FORMAT:
                raise ValueError(f"it is in format {number}, this version reads {FORMAT}")
            return _converter.structure(tables, cls)
        except cattrs.BaseValidationError as error:
            reason = cattrs.transform_error(error, path=MANIFEST, format_exception=_reason)[0]
        except (ValueError, RecursionError) as error:
            reason = str(error)
        raise Refused(where, f"not the manifest of a data set: {reason}")


def _exactly(value: Any, kind: type) -> Any:
    """cattrs would turn `"5"` and `2.7` into ints."""
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"expected {kind.__name__}, got {value!r}")


def _reason(error: BaseException, _: type | None) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, ForbiddenExtraKeysError):
        return f"unknown: {', '.join(map(repr, sorted(error.extra_fields)))}"
    # A validator's arguments are the text, the attribute, the value.
    return " ".join(str(error.args[0] if error.args else error).split())


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly)
    layers = override(rename="layers")
    converter.register_structure_hook(Manifest, make_dict_structure_fn(Manifest, converter, n_layers=layers))
    converter.register_unstructure_hook(Manifest, make_dict_unstructure_fn(Manifest, converter, n_layers=layers))
    return converter


_converter = _make_converter()


def read_manifest(folder: Path, setting: str = "") -> Manifest:
    """The manifest of a data set.

    Args:
        setting: of a recipe, which names the folder; a relative path was looked for beside the recipe as well.

    Raises:
        Refused: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        text = _why_none(folder, beside_recipe=bool(setting) and not folder.is_absolute())
        raise Refused(setting, f"{folder.resolve()}: {text}") if setting else Refused(folder, text)
    return Manifest.from_json(read_small(path), str(path))


def _why_none(folder: Path, *, beside_recipe: bool) -> str:
    """Why a folder has no manifest, and what to do."""
    if not folder.exists():
        return f"no such folder{', nor beside the recipe' if beside_recipe else ''}: make one with `generate`"
    if not folder.is_dir():
        return "not a data set: it is no folder"
    unfinished = any(folder.glob("*_*.h5"))
    hint = "it is not finished: run `generate` again" if unfinished else "make one with `generate`"
    return f"not a data set: no {MANIFEST} in it ({hint})"


def write_manifest(
    folder: Path,
    paths: list[Path],
    about: dict[str, Any],
    rounding_before: Mapping[str, list[float]] | None = None,
) -> Manifest:
    """Complete a data set: write the statistics and the manifest of its chunks.

    Args:
        paths: the chunks in their order, those to train on first.
        about: where the rows come from.
        rounding_before: the NMSE that the rows had lost before they came here; it is added.

    Raises:
        DamagedError: a chunk is damaged.
        Refused: fewer than two rows to train on.
    """
    from safetensors.torch import save

    first = read_summary(paths[0])
    listed: list[Chunk] = []
    totals = Totals()
    for path in paths:
        summary = read_summary(path)
        if summary.style != first.style or summary.row_shapes != first.row_shapes:
            raise DamagedError(f"{path}: its rows are stored in another way than those of {paths[0]}")
        part: Part = "train" if path.name.startswith("train") else "held_out"
        listed.append(Chunk(path.name, part, summary.rows, path.stat().st_size, summary.checksum))
        if part == "train":
            totals.add(summary)
    tensors, nmse = totals.result()
    if rounding_before is not None:
        nmse = {side: [a + b for a, b in zip(nmse[side], rounding_before[side], strict=True)] for side in nmse}
    data = save(tensors)
    n_layers, d_model = first.moments.shape[2:]
    manifest = Manifest(
        n_layers=n_layers,
        d_model=d_model,
        **attrs.asdict(first.style),
        has_tokens=first.has_tokens,
        tokens={name: sum(chunk.rows for chunk in listed if chunk.part == name) for name in get_args(Part)},
        chunks=tuple(listed),
        statistics=xxhash.xxh3_128_hexdigest(data),
        rounding_nmse=nmse,
        about=about,
    )
    write_file(folder / STATISTICS, data)
    write_file(folder / MANIFEST, manifest.to_json())
    return manifest


def default_block_rows(row_bytes: int) -> int:
    """How many rows make a block of about `BLOCK_BYTES`."""
    return max(1, min(1024, BLOCK_BYTES // row_bytes))
