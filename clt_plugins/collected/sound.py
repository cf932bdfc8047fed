"""Whether the numbers of a store can be true: readers index by them, and files may come from anybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from clt_plugins.collected.info import CollectionInfo
from clt_plugins.collected.text import Ints
from clt_plugins.errors import Refused

LARGEST = 2**31 - 1
"""Tokens, and features of all layers: they are numbered in 32 bits."""


def check_info(path: Path, info: CollectionInfo) -> None:
    """Refuse sizes that no store has.

    Raises:
        Refused: names the size.
    """
    records: list[Any] = [info, info.settings, *([info.geometry] if info.geometry is not None else [])]
    for record in records:
        for name, value in attrs.asdict(record, recurse=False).items():
            if isinstance(value, int) and not 0 <= value <= LARGEST and name != "seed":
                raise Refused(path, f"damaged: {name} is {value}")
    if info.n_layers < 1 or info.n_features < 1 or info.n_layers * info.n_features > LARGEST:
        raise Refused(path, f"damaged: {info.n_layers} layers of {info.n_features} features")
    edges = np.array(info.edges)
    if len(edges) < 2 or not (np.isfinite(edges).all() and (edges[1:] > edges[:-1]).all()):
        raise Refused(path, "damaged: edges must be ascending")
    if info.settings.window >= 2**15:
        raise Refused(path, f"damaged: window is {info.settings.window}")


def check_text(path: Path, arrays: Mapping[str, Ints], info: CollectionInfo) -> None:
    """Refuse rows that are not sorted.

    Raises:
        Refused: says which array.
    """
    ids, context, position = (arrays[name] for name in ("ids", "context", "position"))
    if (ids < 0).any():
        raise Refused(path, "damaged: ids below 0")
    same = context[1:] == context[:-1]
    if ((context[1:] < context[:-1]) | (same & (position[1:] <= position[:-1]))).any():
        raise Refused(path, "damaged: its rows are not sorted by context and position")
    if len(ids) and info.contexts != 1 + int((~same).sum()):
        raise Refused(path, f"damaged: it has not {info.contexts} contexts")


def check_vocabulary(path: Path, arrays: Mapping[str, Ints]) -> None:
    """Refuse tokens that are not sorted, or that have bytes which are not there.

    Raises:
        Refused: says which array.
    """
    token, start = arrays["token"], arrays["start"]
    if (token[1:] <= token[:-1]).any():
        raise Refused(path, "damaged: its tokens are not sorted")
    if len(start) != len(token) + 1 or not _ascends(start, len(arrays["bytes"])):
        raise Refused(path, "damaged: start does not divide bytes among the tokens")


def check_features(path: Path, arrays: Mapping[str, Ints], info: CollectionInfo) -> None:
    """Refuse rows and features that do not exist, and windows that reach beyond their text.

    Raises:
        Refused: says which array.
    """
    for name in ("top_row", "group_row"):
        _check_range(path, name, arrays[name], info.tokens)
    _check_range(path, "coactive", arrays["coactive"], info.n_layers * info.n_features)
    _check_range(path, "active", arrays["active"], info.tokens + 1, lowest=0)
    start, count = arrays["window_start"], arrays["window_count"]
    entries = len(arrays["window_offset"])
    counted = (count >= 0).all() and (count.sum(1, dtype=np.int64) == np.diff(start)).all()
    if not (counted and _ascends(start, entries) and len(arrays["window_value"]) == entries):
        raise Refused(path, "damaged: window_start and window_count do not divide the windows among the examples")
    reach = info.settings.window
    offset = arrays["window_offset"]
    if ((offset < -reach) | (offset > reach)).any():
        raise Refused(path, f"damaged: window_offset reaches beyond {reach} tokens")
    for name, array in arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise Refused(path, f"damaged: {name} has numbers that are not finite")


def check_geometry(path: Path, arrays: Mapping[str, Ints], info: CollectionInfo) -> None:
    """Refuse features that do not exist, and numbers that are not finite.

    Raises:
        Refused: says which array.
    """
    for name in ("similar", "upstream", "downstream"):
        _check_range(path, name, arrays[name], info.n_layers * info.n_features)
    for name in ("logits_up_id", "logits_down_id"):
        _check_range(path, name, arrays[name], 2**31)
    for name, array in arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise Refused(path, f"damaged: {name} has numbers that are not finite")


def _check_range(path: Path, name: str, numbers: Ints, size: int, lowest: int = -1) -> None:
    if numbers.size and (int(numbers.min()) < lowest or int(numbers.max()) >= size):
        raise Refused(path, f"damaged: {name} must be from {lowest} to {size - 1}")


def _ascends(start: Ints, end: int) -> bool:
    """Whether these are the limits of parts that make up 0 : end."""
    return bool(start[0] == 0 and start[-1] == end and (start[1:] >= start[:-1]).all())
