"""Which active tokens of a feature are kept as examples: the strongest, and some of each group, without equal ones.

Everything is done for many features at once. An "entry" is an active token of a feature; entries belong to segments: a
feature, or a group of a feature.

Shapes: N entries, S segments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clt_collect.rows import mix

Array = np.ndarray[Any, Any]


def ranked(feature: Array, value: Array) -> Array:
    """The order [N] of entries by feature, then by value, the largest first; equal ones stay in their order.

    Args:
        feature: [N], from 0.
        value: [N] float32, positive.
    """
    # Bits of positive floats ascend with the number.
    bits = value.view(np.uint32).astype(np.int64)
    key = (feature.astype(np.int64) << 32) | (0xFFFFFFFF - bits)
    order: Array = np.argsort(key, kind="stable")
    return order


def group_of(rank: Array, active: Array, groups: int) -> Array:
    """The group of an entry that has `rank` stronger ones among the `active` of its feature: 0 has the strongest.

    Group q has the ranks from q * active // groups on, up to the next group's.
    """
    group: Array = ((rank + 1) * groups - 1) // active
    return group


def first_ones(
    segment: Array, key: Array, same: Array | None, limit: int, likely: Array, segments: int
) -> tuple[Array, Array]:
    """The entries of each segment with the smallest keys; of those with the same window, only the first counts.

    Args:
        segment: which segment each entry is in, [N].
        key: [N] uint64.
        same: the number of each entry's window, [N]; None: all are kept.
        limit: how many of each segment, at most.
        likely: a mask [N] of entries that are looked at first: all that have a key below some limit of their segment.
            It changes the time, not the result.

    Returns:
        The entries, and which of its segment each one is, from 0: in the order of segments, then of these numbers.
    """
    if limit == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    entry, number = _first_ones(segment, key, same, limit, np.flatnonzero(likely))
    # Too many equal ones: the segment needs its other entries too.
    few = np.bincount(segment[entry], minlength=segments) < limit
    few &= np.bincount(segment[~likely], minlength=segments) > 0
    if few.any():
        enough = ~few[segment[entry]]
        more, numbers = _first_ones(segment, key, same, limit, np.flatnonzero(few[segment]))
        entry, number = np.concatenate([entry[enough], more]), np.concatenate([number[enough], numbers])
        order = np.lexsort((number, segment[entry]))
        entry, number = entry[order], number[order]
    return entry, number


def _first_ones(segment: Array, key: Array, same: Array | None, limit: int, entry: Array) -> tuple[Array, Array]:
    entry = entry[np.lexsort((key[entry], segment[entry]))]
    of = segment[entry]
    new = np.ones(len(entry), bool)
    if same is not None:
        window = same[entry]
        order = np.lexsort((window, of))  # stable: of equal ones, that with the smallest key comes first
        again = (of[order][1:] == of[order][:-1]) & (window[order][1:] == window[order][:-1])
        new[order[1:][again]] = False
    entry, of = entry[new], of[new]
    first = np.ones(len(of), bool)
    first[1:] = of[1:] != of[:-1]
    begins = np.flatnonzero(first)
    number = np.arange(len(of)) - np.repeat(begins, np.diff(np.append(begins, len(of))))
    kept = number < limit
    return entry[kept], number[kept]


def draw_key(salt: int, feature: Array, row: Array) -> Array:
    """A random key of each entry [N], which depends on the salt, the feature's number and the row only."""
    with np.errstate(over="ignore"):
        mixed: Array = mix(mix(feature.astype(np.uint64) ^ np.uint64(salt)) ^ row.astype(np.uint64))
    return mixed


def likely_drawn(key: Array, size: Array, limit: int) -> Array:
    """A mask [N] of entries whose key is among the smallest of their segment, about 4 times as many as the limit.

    Args:
        size: entries in the segment of each one, [N].
    """
    share = np.minimum(1.0, (4 * limit + 8) / size)
    return (key >> np.uint64(32)) <= share * 2.0**32
