"""Scores as integers that have their order, and their digits: what the selections on a GPU compare and count.

A key has as many bits as its score: 32, or 64 of a float64. Device functions, compiled by Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """The keys of float32 or float64 numbers. NaN counts as +inf, -0 as 0."""
    x = tl.where(x == x, x, float("inf")) + 0.0
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key


@triton.jit
def number_of(key):
    """The number that has a key."""
    if key.dtype == tl.int64:
        number = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        number = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return number


@triton.jit
def unsigned(key):
    """A key's bits, of which higher ones are better read as an unsigned number. The same function leads back."""
    if key.dtype == tl.int64:
        bits = key ^ -9223372036854775808
    else:
        bits = key ^ -2147483648
    return bits


LOWEST = {32: -2139095040, 64: -9218868437227405312}
"""The key of the lowest finite number, by bits: the first bound, because -inf is never kept."""
LOWEST_32: tl.constexpr = tl.constexpr(LOWEST[32])
LOWEST_64: tl.constexpr = tl.constexpr(LOWEST[64])


@triton.jit
def lowest(key):
    """The key, of the type of `key`, of the lowest finite number."""
    if key.dtype == tl.int64:
        least = tl.full([], LOWEST_64, tl.int64)
    else:
        least = tl.full([], LOWEST_32, tl.int32)
    return least


@triton.jit
def highest(key):
    """The key, of the type of `key`, of +inf."""
    if key.dtype == tl.int64:
        most = tl.full([], 0x7FF0000000000000, tl.int64)
    else:
        most = tl.full([], 0x7F800000, tl.int32)
    return most


@triton.jit
def wide(x):
    """In the type to compare in: float64 stays, all else becomes float32."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def scores(block, scale, shift, at, column, inside):
    """The scores of some numbers of a block; -inf where nothing is inside.

    Args:
        scale, shift: [F], or None. Compiled without contraction to one operation: rounded as torch does.
        at: where the numbers stand; column: of which features they are.
    """
    x = wide(tl.load(block + at, mask=inside, other=float("-inf")))
    if scale is not None:
        x = x * tl.load(scale + column, mask=inside, other=1)
    if shift is not None:
        x = x + tl.load(shift + column, mask=inside, other=0)
    return x


@triton.jit
def kth_digit(counts, left):
    """The digit that the last of the `left` best has: (the digit, how many have it, how many have a higher one).

    Args:
        counts: how many numbers have each digit. If there are fewer than `left`, the digit is 0.
    """
    digit = tl.arange(0, counts.shape[0])
    reach = tl.cumsum(counts, 0, reverse=True)  # with this digit or a higher one
    value = tl.maximum(tl.sum((reach >= left).to(tl.int32)) - 1, 0)
    same = tl.sum(tl.where(digit == value, counts, 0))
    above = tl.sum(tl.where(digit > value, counts, 0))
    return value, same, above


@triton.jit
def marks_of(marked, TILE: tl.constexpr):
    """A byte for each 8 of TILE numbers, with the bits of those that are marked; int32, [TILE / 8]."""
    bit = tl.where(marked, 1 << (tl.arange(0, TILE) % 8), 0)
    return tl.sum(tl.reshape(bit, [TILE // 8, 8]), 1)


@triton.jit
def bits_set(x):
    """How many bits of 32-bit numbers are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def write_down(bits, first, places, capacity, out):
    """Write where the bits of each word are set: first + bit, from the word's place on, as far as there is capacity."""
    for _ in range(tl.max(bits_set(bits))):
        lowest_bit = bits & -bits
        tl.store(out + places, first + bits_set(lowest_bit - 1), mask=(bits != 0) & (places < capacity))
        bits &= bits - 1
        places += 1
