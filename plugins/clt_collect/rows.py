"""The rows of all logs, in the order of the text; and which of them have equal neighbours.

Shapes: T rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np

from clt_collect.written import Written
from clt_plugins import CollectedText, Refused

Array = np.ndarray[Any, Any]


@attrs.frozen(eq=False)
class Rows:
    """The rows of all data ranks, sorted by context and position."""

    text: CollectedText
    number: list[Array]
    """The row in the text of each row of a data rank's log."""
    source: tuple[Array, Array]
    """Where each row of the text comes from: the data rank, and the row in its log; [T] each."""


def sort_rows(logs: Sequence[Written], tensor_ranks: int) -> Rows:
    """Sort the rows of all logs.

    Args:
        logs: of all ranks, in their order. The tensor ranks of one data rank have the same rows.

    Raises:
        Refused: the source yields a token twice.
    """
    of_data = logs[::tensor_ranks]
    ids, context, position = (
        np.concatenate([log.columns[name] for log in of_data]) for name in ("ids", "context", "position")
    )
    order = np.lexsort((position, context))
    ids, context, position = ids[order], context[order], position[order]
    twice = (context[1:] == context[:-1]) & (position[1:] == position[:-1])
    if twice.any():
        row = int(twice.argmax())
        text = f"yields position {position[row]} of context {context[row]} twice: read fewer tokens"
        raise Refused("source", text)
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    begins = np.cumsum([0, *(len(log.columns["ids"]) for log in of_data)])
    rank = np.searchsorted(begins, order, side="right") - 1
    parts = [number[first:last] for first, last in pairwise(begins)]
    return Rows(CollectedText(ids, context, position), parts, (rank.astype(np.int32), order - begins[rank]))


def mix(x: Array) -> Array:
    """64 random bits of each number (splitmix64: Steele et al. 2014, "Fast Splittable Pseudorandom Number
    Generators")."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


BASE = 0x9E6D62D06F6A9A9B
"""An odd number, so that it has an inverse modulo 2^64."""


def equal_windows(text: CollectedText, reach: int) -> Array:
    """A number for each row [T] int32, the same for rows that have equal tokens up to `reach` before and after.

    Windows are compared by a hash of 64 bits: a polynomial of the tokens' own hashes, from prefix sums (Karp and Rabin
    1987).
    """
    rows = np.arange(len(text.ids))
    start, stop = text.around(rows, reach, reach)
    with np.errstate(over="ignore"):
        power = np.full(len(rows) + 1, BASE, np.uint64)
        power[0] = 1
        inverse = np.full(len(rows) + 1, pow(BASE, -1, 2**64), np.uint64)
        inverse[0] = 1
        power, inverse = np.cumprod(power), np.cumprod(inverse)
        prefix = np.zeros(len(rows) + 1, np.uint64)
        prefix[1:] = np.cumsum(mix(text.ids) * power[:-1])
        hashed = (prefix[stop] - prefix[start]) * inverse[start]
        # Where the token stands in its window is a part of it.
        hashed = mix(hashed ^ mix((rows - start) * (2 * reach + 2) + (stop - rows)))
    number: Array = np.unique(hashed, return_inverse=True)[1]
    return number.astype(np.int32)
