"""Tensors of a file that `torch.save` wrote, which may be hostile: nothing in it is run.

`torch.load(weights_only=True)` builds tensors and containers and refuses all else. The file is mapped; a compressed
entry, whose size in memory the file's own does not bound, is refused before.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from clt_plugins import Refused, check_regular

LARGEST = 2**40
"""Bytes of the largest file that is read; tensors in it are mapped."""
LARGEST_PICKLE = 2**26
"""Bytes of the largest entry that is read into memory."""


class Pickled:
    """The tensors of a file, with the methods of `Weights`.

    Args:
        key: the tensors are a dictionary under this name.

    Raises:
        Refused: it is no such file, too large, compressed, or holds other things than tensors.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        _check(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            ValueError,
            EOFError,
            RecursionError,
            KeyError,
            TypeError,
        ) as error:
            raise Refused(path, f"not a file of tensors alone: {' '.join(str(error).split())[:200]}") from error
        tensors = content.get(key) if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise Refused(path, f"expected tensors under {key!r}")
        for name, value in tensors.items():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise Refused(path, f"tensor {name!r} has the shape {list(value.shape)}, and fewer numbers")
        self.tensors: dict[str, Tensor] = {str(name): value for name, value in tensors.items()}
        self.shapes = {name: list(value.shape) for name, value in self.tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str, shape: list[int]) -> Tensor:
        """A tensor of a shape that is known; see `Weights.get`."""
        if self.shapes.get(name) != shape:
            raise Refused(self.path, f"tensor {name!r} is {self.shapes.get(name, 'missing')}, expected {shape}")
        return self.tensors[name].detach()

    def sizes(self, name: str, axes: str) -> list[int]:
        """The shape of a tensor that other shapes follow from; see `Weights.sizes`."""
        shape = self.shapes.get(name)
        if shape is None or len(shape) != axes.count(",") + 1 or 0 in shape:
            raise Refused(self.path, f"{name!r} must be [{axes}], got {shape}")
        return shape


def _check(path: Path) -> None:
    """Refuse what could take more memory than its size on disk."""
    check_regular(path)
    if path.stat().st_size > LARGEST:
        raise Refused(path, f"larger than {LARGEST:,} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Refused(path, f"not a file of torch.save's present format: {error}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(path, f"its entry {entry.filename!r} is compressed, which torch.save does not do")
        if entry.filename.endswith(".pkl") and entry.file_size > LARGEST_PICKLE:
            raise Refused(path, f"its entry {entry.filename!r} is larger than {LARGEST_PICKLE:,} bytes")
