"""Tensors in files, whole or cut among ranks; read back for any number of ranks.

A rank's file says in its header (metadata `slices`) for each tensor that is cut: the axis, where the slice begins, and
the length of the whole. What is whole on every rank stands in the first file. Only the bytes a rank needs are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel

SUFFIX = "-{:05}-of-{:05}.safetensors"


def put_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    parallel: Parallel,
    whole: int,
) -> None:
    """Write this rank's slices of some tensors, `STEM.safetensors` where there is one rank only.

    Args:
        axes: which axis of each tensor counts features; None if every rank has it whole.
        whole: F, of all ranks together.
    """
    if parallel.data_rank > 0:
        return
    ranks, own = parallel.tensor_ranks, parallel.shard(whole)
    slices = {name: [axis, own.start, whole] for name, axis in axes.items() if axis is not None and ranks > 1}
    mine = {name: value for name, value in tensors.items() if name in slices or parallel.tensor_rank == 0}
    name = stem + (SUFFIX.format(parallel.tensor_rank, ranks) if ranks > 1 else ".safetensors")
    # From wherever they are; a view is copied, since a file holds each tensor for itself.
    data = {key: value.detach().cpu().contiguous() for key, value in mine.items()}
    save_file(data, folder / name, metadata={"slices": json.dumps(slices)} if slices else None)


def own_files(folder: Path, parallel: Parallel | None) -> list[Path]:
    """The files of a folder that this rank has written: its slices, and on the first rank all else."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if parallel is None or parallel.world == 1:
        return files
    ends = [SUFFIX.format(rank, parallel.tensor_ranks) for rank in range(parallel.tensor_ranks)]
    if parallel.rank > 0:
        return [path for path in files if parallel.data_rank == 0 and path.name.endswith(ends[parallel.tensor_rank])]
    return [path for path in files if not path.name.endswith(tuple(ends[1:]))]


@attrs.frozen
class Piece:
    """A tensor's part in one file: where it lies along the axis that is cut."""

    file: Path
    start: int
    stop: int


@attrs.define
class SlicedTensors:
    """The tensors of `STEM.safetensors`, or of its slices."""

    folder: Path
    shapes: dict[str, list[int]] = attrs.field(factory=dict)
    """Of the whole tensors."""
    axes: dict[str, int] = attrs.field(factory=dict)
    """The axis of those that are cut."""
    pieces: dict[str, list[Piece]] = attrs.field(factory=dict)
    """In order; of a tensor that is not cut, one of length 0."""

    @classmethod
    def find(cls, folder: Path, stem: str) -> SlicedTensors:
        """Read the headers.

        Raises:
            ValueError: a file is missing or not readable, or slices leave a gap.
        """
        files = [folder / f"{stem}.safetensors"]
        sliced = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if sliced:
            files = [folder / (stem + SUFFIX.format(rank, int(sliced[0].stem[-5:]))) for rank in range(len(sliced))]
            if int(sliced[0].stem[-5:]) != len(sliced):
                raise Refused(folder, f"{len(sliced)} slices of {stem} of {int(sliced[0].stem[-5:])}")
        found = cls(folder)
        for file in files:
            with _opened(file) as data:
                slices = json.loads((data.metadata() or {}).get("slices", "{}"))
                for name in data.keys():  # noqa: SIM118 - not a dict
                    found._note(file, name, data.get_slice(name).get_shape(), slices.get(name))
        for name, axis in found.axes.items():
            edges = [0, *(piece.stop for piece in found.pieces[name])]
            if [*(piece.start for piece in found.pieces[name]), found.shapes[name][axis]] != edges:
                raise Refused(folder, f"slices of tensor {name!r} leave a gap")
        return found

    def _note(self, file: Path, name: str, shape: list[int], slice_: list[int] | None) -> None:
        piece = Piece(file, 0, 0)
        if slice_ is not None:
            axis, start, whole = slice_
            piece = Piece(file, start, start + shape[axis])
            self.axes[name] = axis
            shape = [*shape[:axis], whole, *shape[axis + 1 :]]
        self.shapes[name] = shape
        self.pieces.setdefault(name, []).append(piece)

    def read(self, name: str, axis: int | None = None, own: range | None = None) -> Tensor:
        """A tensor, or the part `own` of it along an axis; on the CPU.

        Raises:
            ValueError: a file is not readable.
        """
        cut = self.axes.get(name, axis)
        if cut is None or own is None:
            cut, own = cut or 0, range(self.shapes[name][cut or 0]) if self.shapes[name] else range(0)
        parts = [part for piece in self.pieces[name] for part in self._parts(name, piece, cut, own)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, cut)

    def _parts(self, name: str, piece: Piece, axis: int, own: range) -> Iterator[Tensor]:
        """What a file holds of the wanted part."""
        with _opened(piece.file) as data:
            if not self.shapes[name]:
                yield data.get_tensor(name)
                return
            stop = piece.stop if name in self.axes else self.shapes[name][axis]
            first, last = max(piece.start, own.start), min(stop, own.stop)
            if first < last or stop == 0:
                at = slice(first - piece.start, last - piece.start)
                yield data.get_slice(name)[(*[slice(None)] * axis, at)]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise Refused(file, f"not a readable safetensors file: {error}") from error
