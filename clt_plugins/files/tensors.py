"""Safetensors files, for authors of exporters: write them in one type, and read them one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clt_plugins.errors import Refused
from clt_plugins.files.atomic import FILE_MODE
from clt_plugins.files.untrusted import check_regular


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, converted to one type.

    Args:
        dtype: torch's name of the type: "float32", "bfloat16".
        metadata: what the file's header says of it, under `__metadata__`.

    Raises:
        OSError: the file cannot be written (disk full, no permission).
    """
    kind = getattr(torch, dtype)
    data = {name: value.detach().cpu().to(kind).contiguous() for name, value in tensors.items()}
    try:
        save_file(data, path, None if metadata is None else dict(metadata))
        # safetensors writes through a temporary file, which only its owner can read.
        path.chmod(FILE_MODE)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    if metadata is not None:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order. Sorted, one transcoder's files are the same bytes each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "as compact as safetensors writes it"
        file.seek(8)
        file.write(text.ljust(size))


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a file. Only the file's header is read.

    Raises:
        Refused: the file is missing, not a regular one, or no complete safetensors file.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's mapping raises the second
        raise Refused(path, f"not a readable safetensors file: {error}") from error


def tensor_bytes(path: Path) -> dict[str, int]:
    """The bytes of a file's tensors by their types, as safetensors names them: F32, BF16. Only the header is read.

    Raises:
        Refused: see `tensor_shapes`.
    """
    check_regular(path)
    total: dict[str, int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(name)
                dtype = piece.get_dtype()
                bits = int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8)  # F8_E4M3, BOOL
                total[dtype] = total.get(dtype, 0) + math.prod(piece.get_shape()) * bits // 8
    except (OSError, RuntimeError, SafetensorError) as error:
        raise Refused(path, f"not a readable safetensors file: {error}") from error
    return total


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file, on the CPU. It is mapped: the disk is read where the tensor is used.

    Raises:
        Refused: the file is missing or damaged, or has no tensor of that name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's mapping raises the second
        raise Refused(path, f"tensor {name!r} cannot be read: {error}") from error
