"""Adam's update on a CPU, compiled by Numba: `AdamUpdate` defines every number of it.

Numbers are read and written once. Sums are not reordered and no operations are joined, so that the results have the
bits of the engine's reference, on any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from clt_kernels.cpu.bits import _bits_of, _float_of, fetch_add, widen
from clt_kernels.cpu.compiled import compiled

UNIT = 2**14
"""Numbers in a unit of work of a thread."""
CHUNK = 1024
"""Numbers that a loop goes through: float32 weights between two loops stay in the first cache."""

GOLDEN = np.uint32(0x9E3779B1)
ONE, TWO = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
LOW = np.uint32(0xFFFF)
HALF = np.uint32(0x8000)
NAN = np.uint32(0x7FC00000)


@compiled(fastmath=False, inline="always")
def mix(x):
    """The last steps of MurmurHash3."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * ONE)
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * TWO)
    return np.uint32(x ^ (x >> np.uint32(16)))


def load(x: Any, kept: Any, low: Any) -> None:
    """Read weights as float32, joined with their lower halves where `low` holds them."""


@overload(load)
def _compileload(x, kept, low):
    if low.dtype == types.int16:

        def halves(x, kept, low):
            for i in range(len(kept)):
                x[i] = _float_of(np.uint32((np.uint32(kept[i]) << np.uint32(16)) + np.uint32(low[i])))

        return halves

    def whole(x, kept, low):
        for i in range(len(kept)):
            x[i] = widen(kept[i])

    return whole


def rounded(x: Any, random: Any, like: Any) -> Any:
    """A float32 in the stored type of `like`: as bfloat16 rounded by 16 random bits."""


@overload(rounded)
def _compile_rounded(x, random, like):
    if like == types.uint16:
        # NaN stays one, whatever its bits: a sum could make it 0.
        return lambda x, random, like: np.uint16(
            (np.uint32(_bits_of(x) + (random & LOW)) if x == x else NAN) >> np.uint32(16)
        )
    return lambda x, random, like: x


def save(x: Any, out: Any, low: Any, first: Any, key: Any) -> None:
    """Write float32 weights, as halves where `low` holds them."""


@overload(save)
def _compile_save(x, out, low, first, key):
    if low.dtype == types.int16:

        def halves(x, out, low, first, key):
            for i in range(len(out)):
                bits = _bits_of(x[i]) if x[i] == x[i] else NAN
                high = np.uint32(np.uint32(bits + HALF) >> np.uint32(16))
                out[i] = np.uint16(high)
                low[i] = np.int16(np.uint16(np.uint32(bits - np.uint32(high << np.uint32(16)))))

        return halves

    def whole(x, out, low, first, key):
        for i in range(len(out)):
            out[i] = rounded(x[i], mix(np.uint32(np.uint32(first + np.uint32(i)) ^ key)), out[i])

    return whole


@compiled(fastmath=False, error_model="numpy")
def _adam(x, grad, mean, square, scalars, settings, first, key):
    """The update of weights x; first: the number of the first element, its low half."""
    grad_factor, rate, root_factor, decay = scalars[0], scalars[1], scalars[2], scalars[3]
    rest1, beta2, rest2, eps, weight_decay = settings[0], settings[1], settings[2], settings[3], settings[4]
    for i in range(len(grad)):
        bits = mix(np.uint32(np.uint32(first + np.uint32(i)) ^ key))
        w = x[i]
        g = widen(grad[i]) * grad_factor + weight_decay * w
        m = widen(mean[i])
        m = m + (g - m) * rest1
        v = widen(square[i]) * beta2 + rest2 * g * g
        w = w - decay * w
        x[i] = w - rate * m / (np.sqrt(v) * root_factor + eps)
        mean[i] = rounded(m, np.uint32(bits >> np.uint32(16)), mean[i])
        square[i] = rounded(v, np.uint32(np.uint32(bits * GOLDEN) >> np.uint32(16)), square[i])


@compiled(fastmath=False, parallel=True)
def update(weight, low, grad, mean, square, scalars, settings, columns, numbering, key, threads):
    """All tensors flat, [R * C]; `low` is int16, or one number of another type where there is none.

    Args:
        settings: 1 - beta1, beta2, 1 - beta2, eps, coupled weight decay; float32.
        numbering: `AdamUpdate`'s first, period, stride.
        key: of parameter and step, not yet mixed.
    """
    size, halves = len(weight), len(low) == len(weight)
    units = (size + UNIT - 1) // UNIT
    counter = np.zeros(1, np.int64)
    key = mix(key)
    for _ in prange(threads):
        x = np.empty(CHUNK, np.float32)
        while True:
            unit = fetch_add(counter)
            if unit >= units:
                break
            start, stop = unit * UNIT, min(size, (unit + 1) * UNIT)
            while start < stop:
                row, column = start // columns, start % columns
                first = row // numbering[1] * numbering[2] + row % numbering[1] * columns + numbering[0] + column
                # To the end of the row; and where the high half of the number changes, the key does.
                count = min(stop - start, columns - column, CHUNK, 2**32 - (first & 0xFFFFFFFF))
                end = start + count
                high = np.uint32(np.uint32(first >> 32) * GOLDEN)
                own_key = np.uint32(high ^ key)
                begin = np.uint32(first & 0xFFFFFFFF)
                part = low[start:end] if halves else low
                load(x, weight[start:end], part)
                _adam(x, grad[start:end], mean[start:end], square[start:end], scalars, settings, begin, own_key)
                save(x, weight[start:end], part, begin, own_key)
                start = end
