"""numpy arrays in safetensors files, checked against the schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clt_plugins.collected.schema import Array, misfit
from clt_plugins.errors import Refused

Arrays = Mapping[str, np.ndarray[Any, Any]]


def write_arrays(path: Path, arrays: Arrays, table: Mapping[str, Array], letters: dict[str, int]) -> None:
    """Write a file.

    Raises:
        ValueError: an array is missing, unknown, or of another type or shape than the schema says.
        OSError: it could not be written.
    """
    faults = _faults({name: (str(one.dtype), one.shape) for name, one in arrays.items()}, table, letters)
    if faults:
        raise ValueError(f"{path.name}: {'; '.join(faults)}")
    try:
        save_file({name: np.ascontiguousarray(one) for name, one in arrays.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def map_arrays(path: Path, table: Mapping[str, Array], letters: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a file, mapped: the disk is read where they are used. They cannot be written to.

    Raises:
        Refused: the file is missing or damaged, or its arrays are not those of the schema.
    """
    try:
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, RuntimeError, SafetensorError, TypeError) as error:  # torch's mapping raises the second
        raise Refused(path, f"not a readable safetensors file: {error}") from error
    faults = _faults({name: (str(one.dtype), one.shape) for name, one in arrays.items()}, table, letters)
    if faults:
        raise Refused(path, f"damaged: {faults[0]}")
    for one in arrays.values():
        one.flags.writeable = False
    return arrays


def _faults(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]], table: Mapping[str, Array], letters: dict[str, int]
) -> list[str]:
    missing = [name for name, array in table.items() if name not in arrays and not array.optional]
    unknown = [name for name in arrays if name not in table]
    faults = [f"{name} is missing" for name in missing]
    faults += [f"there is no {name} in a store" for name in unknown]
    for name, (dtype, shape) in arrays.items():
        if name in table and (text := misfit(name, table[name], dtype, shape, letters)):
            faults.append(text)
    return faults
