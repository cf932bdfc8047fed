"""Tensors in files, in one file or cut among ranks; any number of ranks can read them back.

The header of a rank's file (metadata `slices`) says for each tensor that is cut: the axis, where the slice begins, and
the length of the complete axis. Tensors that every rank has complete are in the first file. A rank reads only the
bytes that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clt_plugins.errors import Refused
from clt_plugins.files.untrusted import parse_json

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel

SUFFIX = "-{:05}-of-{:05}.safetensors"


def put_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    parallel: Parallel,
    n_features: int,
) -> None:
    """Write this rank's slices of some tensors; one rank alone writes `STEM.safetensors`.

    Args:
        tensors: this rank's, by name.
        axes: which axis of each tensor counts features; None if every rank has the complete tensor.
        n_features: F, per layer, of all ranks together.
    """
    if parallel.data_rank > 0:
        return
    ranks, owned = parallel.tensor_ranks, parallel.shard(n_features)
    slices = {name: [axis, owned.start, n_features] for name, axis in axes.items() if axis is not None and ranks > 1}
    written = {name: value for name, value in tensors.items() if name in slices or parallel.tensor_rank == 0}
    file = stem + (SUFFIX.format(parallel.tensor_rank, ranks) if ranks > 1 else ".safetensors")
    # `contiguous` copies views: safetensors refuses tensors that share memory.
    data = {name: value.detach().cpu().contiguous() for name, value in written.items()}
    save_file(data, folder / file, metadata={"slices": json.dumps(slices)} if slices else None)


def files_of_rank(folder: Path, parallel: Parallel | None) -> list[Path]:
    """The files below a folder that this rank has written: its slices, and on rank 0 everything else."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if parallel is None or parallel.world == 1:
        return files
    ends = [SUFFIX.format(rank, parallel.tensor_ranks) for rank in range(parallel.tensor_ranks)]
    if parallel.rank > 0:
        return [path for path in files if parallel.data_rank == 0 and path.name.endswith(ends[parallel.tensor_rank])]
    return [path for path in files if not path.name.endswith(tuple(ends[1:]))]


@attrs.frozen
class Piece:
    """The part of a tensor that one file holds: `start` to `stop` along the axis that is cut."""

    file: Path
    start: int
    stop: int


@attrs.define
class SlicedTensors:
    """The tensors of `STEM.safetensors`, or of the files of several ranks."""

    folder: Path
    shapes: dict[str, list[int]] = attrs.field(factory=dict)
    """The shape of each complete tensor."""
    axes: dict[str, int] = attrs.field(factory=dict)
    """The axis along which a tensor is cut; it has no entry if it is not cut."""
    pieces: dict[str, list[Piece]] = attrs.field(factory=dict)
    """The pieces of each tensor, in order; a tensor that is not cut has a single piece, of length 0."""

    @classmethod
    def find(cls, folder: Path, stem: str) -> SlicedTensors:
        """Read the headers of the files.

        Raises:
            Refused: a file is missing or not readable, or a part of a tensor is in no file.
        """
        tensors = cls(folder)
        for file in _files(folder, stem):
            with _opened(file) as data:
                slices = _slices(file, (data.metadata() or {}).get("slices", "{}"))
                for name in data.keys():  # noqa: SIM118 - not a dict
                    tensors._note(file, name, data.get_slice(name).get_shape(), slices.get(name))
        for name, axis in tensors.axes.items():
            pieces = tensors.pieces[name]
            starts = [*(piece.start for piece in pieces), tensors.shapes[name][axis]]
            if starts != [0, *(piece.stop for piece in pieces)]:
                raise Refused(folder, f"slices of tensor {name!r} leave a gap: the folder is not complete")
        return tensors

    def _note(self, file: Path, name: str, shape: list[int], slice_: list[int] | None) -> None:
        """Remember what a file's header says of a tensor."""
        piece = Piece(file, 0, 0)
        if slice_ is not None:
            axis, start, length = slice_
            if axis >= len(shape):
                raise Refused(file, f"damaged: tensor {name!r} has no axis {axis}")
            piece = Piece(file, start, start + shape[axis])
            self.axes[name] = axis
            shape = [*shape[:axis], length, *shape[axis + 1 :]]
        self.shapes[name] = shape
        self.pieces.setdefault(name, []).append(piece)

    def read(self, name: str) -> Tensor:
        """A complete tensor, on the CPU.

        Raises:
            Refused: a file is not readable.
        """
        parts = []
        for piece in self.pieces[name]:
            with _opened(piece.file) as data:
                parts.append(data.get_tensor(name))
        return torch.cat(parts, self.axes[name]) if name in self.axes else parts[0]

    def read_part(self, name: str, axis: int, owned: range) -> Tensor:
        """The indices `owned` of a tensor along an axis, on the CPU; reads only their bytes.

        Args:
            axis: the axis that counts features: a tensor that is cut in the files is cut along it.

        Raises:
            Refused: a file is not readable.
        """
        parts = []
        for piece in self.pieces[name]:
            start, stop = (piece.start, piece.stop) if name in self.axes else (0, self.shapes[name][axis])
            first, last = max(start, owned.start), min(stop, owned.stop)
            if first < last:
                with _opened(piece.file) as data:
                    indices = slice(first - start, last - start)
                    parts.append(data.get_slice(name)[(*[slice(None)] * axis, indices)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _files(folder: Path, stem: str) -> list[Path]:
    """The files of all ranks.

    Raises:
        Refused: there are fewer or more than the names say.
    """
    sliced = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not sliced:
        return [folder / f"{stem}.safetensors"]
    ranks = int(sliced[0].stem[-5:])
    if ranks != len(sliced):
        raise Refused(folder, f"{len(sliced)} slices of {stem} of {ranks}: the folder is not complete")
    return [folder / (stem + SUFFIX.format(rank, ranks)) for rank in range(ranks)]


def _slices(file: Path, text: str) -> dict[str, list[int]]:
    """What a header says of slices: axis, first feature and number of all features, by tensor."""
    try:
        table = parse_json(text.encode())
    except ValueError as error:
        raise Refused(file, f"damaged: 'slices' in its header: {error}") from error
    rows = list(table.values()) if isinstance(table, dict) else [None]
    if not all(isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row) for row in rows):
        raise Refused(file, "damaged: 'slices' in its header must be three numbers for each tensor")
    return table


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's mapping raises the second
        raise Refused(file, f"not a readable safetensors file: {error}") from error
