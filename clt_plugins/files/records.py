"""JSON files that hold records: the attrs class of a file says which keys it has, and of which types.

cattrs writes and reads them. A tensor is a list, a path is a string, None is null. JSON has no NaN, so records have
none: a number that is not defined is None (see `defined`). Reading is as strict as reading a recipe: an unknown key, a
missing key or a wrong type is an error that names the file and the key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch import Tensor

from clt_plugins.errors import Faults, Refused, fault
from clt_plugins.files.untrusted import load_json
from clt_plugins.recipe.structure import converter

if TYPE_CHECKING:
    import cattrs

    from clt_plugins.contract.spec import Choice

FORMAT = 1
"""The version of all files that the engine writes; records of files have it as their field `format`."""

MEMORY_ONLY = {"json": False}
"""Metadata of a field that is not written to JSON; such a field needs a default."""

Record = TypeVar("Record")


def as_data(record: Any) -> Any:
    """A record as plain data: dictionaries, lists, numbers, strings and None."""
    return _converter().unstructure(record)


def from_data(record_class: type[Record], data: Any, origin: str | Path = "") -> Record:
    """A record from plain data.

    Args:
        origin: the file that errors name.

    Raises:
        Faults: a key is unknown or missing, or a value has a wrong type; one line for each.
    """
    if isinstance(data, Mapping) and "format" in attrs.fields_dict(record_class):  # type: ignore[arg-type]
        written_in = data.get("format")
        if written_in != FORMAT:
            raise Refused(origin, f"written in format {written_in}, this version reads {FORMAT}")
    try:
        return _converter().structure(data, record_class)
    except Faults as error:
        raise Faults(attrs.evolve(one, origin=str(origin)) for one in error.faults) from error


def json_text(data: Any) -> str:
    """A record, or plain data, as indented JSON.

    Raises:
        ValueError: it holds NaN or an infinity.
    """
    return json.dumps(as_data(data), indent=2, allow_nan=False)


def write_json(path: Path, data: Any) -> None:
    """Write a record, or plain data, into a file.

    Raises:
        OSError: it could not be written.
    """
    path.write_text(json_text(data) + "\n", encoding="utf-8")


def read_json(path: Path, record_class: type[Record]) -> Record:
    """The record in a file that `write_json` wrote.

    Raises:
        Refused: the file is missing, or not JSON.
        Faults: see `from_data`.
        OSError: it cannot be read; names it.
    """
    return from_data(record_class, load_json(path), path)


def defined(numbers: Tensor) -> list[float | None]:
    """The numbers of a tensor [n]; None where it is not finite."""
    return [number if math.isfinite(number) else None for number in numbers.tolist()]


@cache
def _converter() -> cattrs.Converter:
    reader = converter(_no_choice)
    reader.register_structure_hook(Tensor, lambda value, _: _tensor(value))
    reader.register_structure_hook(Path, lambda value, _: Path(value))
    reader.register_unstructure_hook(Tensor, lambda value: value.tolist())
    reader.register_unstructure_hook(Path, str)
    reader.register_unstructure_hook_factory(attrs.has, lambda record_class: _writer(record_class, reader))
    return reader


def _tensor(value: Any) -> Tensor:
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise fault(f"expected lists of numbers: {error}") from error


def _writer(record_class: Any, reader: cattrs.Converter) -> Any:
    """How a record becomes a dictionary: all fields by their alias, without those for the memory only."""
    from cattrs.gen import make_dict_unstructure_fn, override

    fields = attrs.fields(attrs.resolve_types(record_class))
    omitted: Any = {a.name: override(omit=True) for a in fields if a.metadata.get("json") is False}
    return make_dict_unstructure_fn(record_class, reader, _cattrs_use_alias=True, **omitted)


def _no_choice(slot: str, name: str) -> Choice:
    # Choices of plugins are kept as plain tables, since a file may be read before its plugins are known.
    raise TypeError(f"a record holds no choices ({slot} {name!r})")
