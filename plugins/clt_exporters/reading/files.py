"""Files of another tool, which may be damaged or hostile: every shape is looked at before a tensor is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from clt_plugins import Refused, load_json, read_small, read_tensor, tensor_shapes

LARGEST = 2**22
"""Bytes of the largest description in YAML that is read."""


class Weights:
    """A safetensors file, of which one tensor is mapped at a time.

    Raises:
        Refused: it is missing, or no complete safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes = tensor_shapes(path)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def get(self, name: str, shape: list[int]) -> Tensor:
        """A tensor of a shape that is known.

        Raises:
            Refused: it is missing, or has another shape.
        """
        if name not in self.shapes:
            raise Refused(self.path, f"lacks tensor {name!r}")
        if self.shapes[name] != shape:
            raise Refused(self.path, f"tensor {name!r} is {self.shapes[name]}, expected {shape}")
        return read_tensor(self.path, name)

    def sizes(self, name: str, axes: str) -> list[int]:
        """The shape of a tensor that other shapes follow from.

        Args:
            axes: what its axes are, for people: "features, d_model".

        Raises:
            Refused: it is missing, has another number of axes, or one of length 0.
        """
        shape = self.shapes.get(name)
        if shape is None or len(shape) != axes.count(",") + 1 or 0 in shape:
            raise Refused(self.path, f"{name!r} must be [{axes}], got {shape}")
        return shape


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Files or folders below a folder with a number in their names, by that number.

    Args:
        pattern: the name, with {} for the number: "layer_{}.safetensors".

    Raises:
        Refused: two have one number.
    """
    head, tail = map(re.escape, pattern.split("{}"))
    by_number: dict[int, Path] = {}
    for path in folder.glob(pattern.replace("{}", "*")):
        match = re.fullmatch(f"{head}(\\d{{1,4}}){tail}", path.name)
        if match is not None:
            other = by_number.setdefault(int(match[1]), path)
            if other != path:
                raise Refused(folder, f"{other.name} and {path.name} are of one layer")
    return [by_number[number] for number in sorted(by_number)]


def consecutive(folder: Path, pattern: str) -> list[Path]:
    """The files of layers 0, 1, ... without a gap.

    Raises:
        Refused: one is missing.
    """
    paths = numbered(folder, pattern)
    for number, path in enumerate(paths):
        if path.name != pattern.format(number):
            raise Refused(folder / pattern.format(number), f"missing: there is {path.name}")
    return paths


def described(folder: Path, *names: str) -> tuple[Path, Mapping[str, Any]]:
    """The first description that is there, and its content; an empty one if there is none.

    Args:
        names: of YAML or JSON files.

    Raises:
        Refused: it is not readable, or not a table.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return folder / names[0], {}
    content = load_json(path) if path.suffix == ".json" else _load_yaml(path)
    if not isinstance(content, Mapping):
        raise Refused(path, f"expected a table, got {type(content).__name__}")
    return path, content


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_small(path, LARGEST).decode("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(path, f"not a readable YAML file: {' '.join(str(error).split())}") from error


def whole(value: Any, path: Path, name: str) -> int:
    """A setting that must be a whole number above 0.

    Raises:
        Refused: it is not.
    """
    if type(value) is not int or value < 1:
        raise Refused(path, f"{name} must be a whole number above 0, got {value!r}")
    return value


def text(value: Any) -> str | None:
    """A setting that is text, or nothing."""
    return value if isinstance(value, str) and value else None
