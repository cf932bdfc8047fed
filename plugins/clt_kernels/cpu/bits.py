"""What Numba lacks and the CPU kernels need: bfloat16 as bits, comparing many at once, prefetching, atomic counting."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LINE = 64
"""Bytes in a cache line."""
GROUP = 64
"""Numbers that are compared at once: a bit each."""


@intrinsic
def _float_of(typing, bits):
    """The float32 with these bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _bits_of(typing, x):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def above(typing, numbers, start, bound):
    """A bit for each of numbers[start : start + GROUP]: whether it is above the bound or NaN. uint64, the first lowest.

    Vector instructions compare, so most groups are done with when nothing in them is above.
    """

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        group = ir.VectorType(data.type.pointee, GROUP)
        address = builder.bitcast(builder.gep(data, [args[1]]), group.as_pointer())
        loaded = builder.load(address, align=signature.args[0].dtype.bitwidth // 8)
        one = builder.insert_element(ir.Constant(group, ir.Undefined), args[2], ir.Constant(ir.IntType(32), 0))
        every = ir.Constant(ir.VectorType(ir.IntType(32), GROUP), [0] * GROUP)
        bounds = builder.shuffle_vector(one, ir.Constant(group, ir.Undefined), every)
        return builder.bitcast(builder.fcmp_unordered(">", loaded, bounds), ir.IntType(64))

    return types.uint64(numbers, types.int64, numbers.dtype), generate


@intrinsic
def lowest_bit(typing, bits):
    """The number of the lowest bit that is set in a uint64 that is not 0."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def fetch_add(typing, counter):
    """Add one to `counter[0]` (int64) and return its old value; no two threads get the same number."""

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def prefetch(typing, array, index):
    """Start loading the cache line of an element of a flat array; the index must be within the array."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        # Read; keep in all caches; data.
        builder.call(function, [address, ir.Constant(number, 0), ir.Constant(number, 3), ir.Constant(number, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def widen(x: Any) -> Any:
    """A stored number as a number to compute with: bfloat16 is stored as its bits."""


@overload(widen, inline="always")
def _compile_widen(x):
    if x == types.uint16:
        return lambda x: _float_of(np.uint32(x) << np.uint32(16))
    return lambda x: x


def narrow(x: Any, like: Any) -> Any:
    """A number in the stored type of `like`: rounded to the nearest (even) bfloat16 if `like` holds bits."""


@overload(narrow, inline="always")
def _compile_narrow(x, like):
    if like == types.uint16:

        def to_bfloat16(x, like):
            bits = _bits_of(x)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)) if x == x else np.uint16(0x7FC0)

        return to_bfloat16
    return lambda x, like: x


def readable(row: Any, buffer: Any) -> Any:
    """A stored row as numbers to compute with: the row itself, or widened into the buffer."""


@overload(readable, inline="always")
def _compile_readable(row, buffer):
    if row.dtype == types.uint16:

        def through_buffer(row, buffer):
            for d in range(len(row)):
                buffer[d] = widen(row[d])
            return buffer[: len(row)]

        return through_buffer
    return lambda row, buffer: row
