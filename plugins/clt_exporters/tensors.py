"""Reading safetensors a tensor at a time, and writing them in one type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clt_plugins import Refused


def write(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write tensors in a type."""
    wanted = getattr(torch, dtype)
    save_file({name: value.detach().cpu().to(wanted).contiguous() for name, value in tensors.items()}, path)


def shapes(path: Path) -> dict[str, list[int]]:
    """The tensors of a file, without reading them.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise Refused(path, f"not a readable safetensors file: {error}") from error


def read(path: Path, name: str) -> Tensor:
    """One tensor, on the CPU; its pages are read from disk when they are touched.

    Raises:
        ValueError: it is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise Refused(path, f"no tensor {name!r} to be read: {error}") from error
