"""Adam's update on a CUDA GPU: one program for some columns of a row; `AdamUpdate` defines every number of it.

Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """The last steps of MurmurHash3, on uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _bits(x):
    """The bits of float32 numbers; those of NaN are 0x7FC00000, as a GPU's own become 0 if something is added."""
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def _rounded(x, random):
    """float32 as bfloat16, by the low 16 random bits."""
    bits = _bits(x) + (random & 0xFFFF)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["key", "first", "period", "stride"])
def adam(
    weight, low, grad, mean, square, squares, scalars,
    key: tl.int32, first: tl.int64, period: tl.int32, stride: tl.int64,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr, weight_decay: tl.constexpr,
    SPLIT: tl.constexpr, USED: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tensors [R, C]; a row whose gradient is 0 (`squares` [R], where USED) is not read."""
    tiles: tl.constexpr = (C + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    inside = column < C
    at = row.to(tl.int64) * C + column
    end = C
    if USED:
        end = tl.where(tl.load(squares + row) == 0, 0, C)
    m = tl.load(mean + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(square + at, mask=inside, other=0).to(tl.float32)
    kept = tl.load(weight + at, mask=inside, other=0)
    g = tl.load(grad + at, mask=column < end, other=0).to(tl.float32) * tl.load(scalars)
    if SPLIT:
        half = tl.load(low + at, mask=inside, other=0)
        bits = (kept.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) + half.to(tl.int32).to(tl.uint32, bitcast=True)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = kept.to(tl.float32)
    if weight_decay != 0:
        g += weight_decay * w
    m += (g - m) * (1 - beta1)
    v = v * beta2 + (1 - beta2) * g * g
    w -= tl.load(scalars + 3) * w
    w -= tl.load(scalars + 1) * m / (tl.sqrt(v) * tl.load(scalars + 2) + eps)
    # The number of each element: in 64 bits, as a decoder may have more than 2^32 of them.
    element = row // period * stride + (row % period).to(tl.int64) * C + first + column
    step_key = _mix(key.to(tl.uint32) + tl.load(scalars + 4).to(tl.uint32) * 0x9E3779B1)
    high = (element >> 32).to(tl.uint32) * 0x9E3779B1
    random = _mix(element.to(tl.uint32) ^ high ^ step_key)
    if SPLIT:
        bits = _bits(w)
        upper = (bits + 0x8000) >> 16
        tl.store(weight + at, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(low + at, (bits - (upper << 16)).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    elif weight.dtype.element_ty == tl.bfloat16:
        tl.store(weight + at, _rounded(w, random), mask=inside)
    else:
        tl.store(weight + at, w, mask=inside)
    if mean.dtype.element_ty == tl.bfloat16:
        tl.store(mean + at, _rounded(m, random >> 16), mask=inside)
        tl.store(square + at, _rounded(v, (random * 0x9E3779B1) >> 16), mask=inside)
    else:
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
