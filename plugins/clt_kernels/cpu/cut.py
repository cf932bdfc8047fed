"""Keys of numbers, and cutting a pool of candidates to its best ones.

Candidates are compared as integers, their keys, which have the order of the numbers: no branch is needed for NaN or
signs. Where the k-th best lies is found by counting: the range of the keys is cut into equal parts, and the keys in
each are counted.

Shapes: C candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from clt_kernels.cpu.compiled import compiled

PARTS = 4096
"""Most parts of a range: their counts stay in the first cache."""


def key_of(bits: Any) -> Any:
    """The number of these bits, as an integer of the same order. NaN counts as +inf, -0 as 0."""


@overload(key_of)
def _compile_key_of(bits):
    number = np.dtype(bits.name).type
    sign = number(bits.bitwidth - 1)
    magnitude, zero = number(2 ** (bits.bitwidth - 1) - 1), number(0)
    infinity = number(0x7F800000 if bits.bitwidth == 32 else 0x7FF0000000000000)

    def compute(bits):
        size = bits & magnitude
        b = infinity if size > infinity else bits
        b = zero if size == zero else b
        return b ^ ((b >> sign) & magnitude)

    return compute


@compiled()
def bits_of(key, like):
    """The bits of the number that has this key; `like`: an array of keys."""
    return key ^ ((key >> (8 * like.itemsize - 1)) & ((1 << (8 * like.itemsize - 1)) - 1))


@compiled()
def _part(keys, count, left, counts):
    """Where the `left`-th largest of keys[:count] lies.

    Returns:
        base, shift: a key is in part ((key >> 1) - base) >> shift; the number of the part; and how many keys of that
        part are among the `left` largest. The shift is -1 where all keys are equal but for their last bit.
    """
    low = high = keys[0]
    for i in range(count):
        low = min(low, keys[i])
        high = max(high, keys[i])
    # Halves: the difference of two keys may need a bit more than they have.
    base = np.int64(low) >> 1
    span = (np.int64(high) >> 1) - base
    if span == 0:
        return base, -1, 0, left
    # About as many parts as keys: fewer would leave more keys in a part, more would take longer to go through.
    parts = 64
    while parts < count and parts < len(counts):
        parts *= 2
    shift = 0
    while span >> shift >= parts:
        shift += 1
    value = span >> shift
    counts[: value + 1] = 0
    for i in range(count):
        counts[((np.int64(keys[i]) >> 1) - base) >> shift] += 1
    while counts[value] < left:
        left -= counts[value]
        value -= 1
    return base, shift, value, left


@compiled()
def kth(keys, count, k, counts, same):
    """The k-th largest of keys[:count], and how many of those equal to it are among the k.

    Args:
        counts: int32, 64 to `PARTS`, overwritten; same: as large as `keys`, overwritten.
    """
    source, number, left = keys, count, k
    while True:
        base, shift, value, left = _part(source, number, left, counts)
        if shift < 0:
            low = high = source[0]
            highest = 0
            for i in range(number):
                low = min(low, source[i])
                high = max(high, source[i])
            for i in range(number):
                highest += source[i] == high
            return (high, left) if highest >= left else (low, left - highest)
        inside = 0
        for i in range(number):
            # Written whether it is inside or not, and overwritten if not: a branch would be mispredicted.
            key = source[i]
            same[inside] = key
            inside += ((np.int64(key) >> 1) - base) >> shift == value
        source, number = same, inside


@compiled()
def cut(keys, ids, values, count, k, counts, same):
    """Keep the k best of `count` candidates, in their order; returns the key of the k-th best."""
    bound, left = kth(keys, count, k, counts, same)
    kept = 0
    for i in range(count):
        key = keys[i]
        equal = (key == bound) & (left > 0)
        left -= equal
        keys[kept], ids[kept], values[kept] = key, ids[i], values[i]
        kept += (key > bound) | equal
    return bound


@compiled()
def cut_near(keys, ids, values, count, k, bound, counts, same):
    """Keep the k best of `count` candidates, and perhaps some more, in their order.

    Whole parts of the range are kept: that takes half the time of finding the k-th best. Where too much would be left,
    as of many equal keys, the cut is exact.

    Returns:
        How many are kept, and the bound for others: as many as k that are kept are above it, or equal and earlier.
    """
    base, shift, value, left = _part(keys, count, k, counts)
    if shift < 0 or counts[value] - left > (count - k) // 2:
        return k, cut(keys, ids, values, count, k, counts, same)
    least = np.int64(base + (value << shift)) << 1
    kept = 0
    for i in range(count):
        key = keys[i]
        keys[kept], ids[kept], values[kept] = key, ids[i], values[i]
        kept += key >= least
    return kept, max(bound, keys.dtype.type(least - 1))
