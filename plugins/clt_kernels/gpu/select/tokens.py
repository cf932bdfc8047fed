"""The k best of each token while layers go by: device code, compiled by Triton. One program per token.

A token has a pool: the best so far, in the order of their ids. A program lists where its row has numbers that reach the
bound, the k-th best of a full pool; few do. It counts digits of pool and list to find the k-th best of both, and moves
what is kept to the front of the pool, in order. If the list is too short (the first layer, which has no bound yet; a
layer of higher scores), the row itself is gone through.

A row's numbers come after those of the pool and in order, so of equal scores those that come first are kept.

Shapes: B tokens, C columns of a row, K places of a pool.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clt_kernels.gpu.select.keys import (
    bits_set,
    highest,
    kth_digit,
    lowest,
    marks_of,
    number_of,
    ordered,
    scores,
    unsigned,
    wide,
    write_down,
)

DIGIT_BITS: tl.constexpr = tl.constexpr(8)
BINS: tl.constexpr = tl.constexpr(256)
CHUNK: tl.constexpr = tl.constexpr(1024)
"""Candidates that are looked at together."""


@triton.jit(do_not_specialize=["k", "first_id", "columns"])
def see(
    block, scale, shift, pre, keys, ids, values, counts, bounds, listed,
    k, first_id, columns, block_stride, pre_stride, places, capacity, TILE: tl.constexpr,
):  # fmt: skip
    """Show each token's pool its row of a layer.

    Args:
        block: [B, C], by rows of `block_stride`; pre: what is kept with each, by rows of `pre_stride`.
        keys, ids, values: pools [B, places]; counts: how many are in each; bounds: the least key that a new one needs.
        listed: [B, capacity].
    """
    row = tl.program_id(0).to(tl.int64)
    block += row * block_stride
    pre += row * pre_stride
    keys += row * places
    ids += row * places
    values += row * places
    listed += row * capacity
    bound = tl.load(bounds + row)
    found = tl.full([], 0, tl.int32)
    if (bound > lowest(bound)) | (columns <= capacity):
        # Compared as numbers, NaN is not below anything, and is found.
        threshold = number_of(bound)
        for start in range(0, columns, TILE):
            column = start + tl.arange(0, TILE)
            score = scores(block, scale, shift, column, column, column < columns)
            bits = marks_of((score < threshold) == 0, TILE)
            number = bits_set(bits)
            total = tl.sum(number)
            if total > 0:
                first = start + 8 * tl.arange(0, TILE // 8)
                write_down(bits, first, found + tl.cumsum(number, 0) - number, capacity, listed)
                found += total
    else:
        found += capacity + 1
    if found > 0:
        tl.debug_barrier()  # the list is written by some threads and read by others
        number = tl.load(counts + row)
        if found <= capacity:
            made, bound = _join(
                block, scale, shift, pre, keys, ids, values, listed, number, found, bound, k, first_id, True, CHUNK
            )
        else:
            made, bound = _join(
                block, scale, shift, pre, keys, ids, values, listed, number, columns, bound, k, first_id, False, TILE
            )
        tl.store(counts + row, made)
        tl.store(bounds + row, bound)


@triton.jit
def _column(listed, start, stop, LISTED: tl.constexpr, SIZE: tl.constexpr):
    column = start + tl.arange(0, SIZE)
    inside = column < stop
    if LISTED:
        column = tl.load(listed + column, mask=inside, other=0)
    return column, inside


@triton.jit
def _join(
    block, scale, shift, pre, keys, ids, values, listed, number, stop, bound, k, first_id,
    LISTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The k best of a pool's `number` and of a row, into the pool: how many there are, and the new bound."""
    fixed = unsigned(bound) * 0
    left = tl.full([], 0, tl.int32) + k
    low = tl.full([], 0, tl.int32) + bound.dtype.primitive_bitwidth
    done = left < 0
    while (low > 0) & (done == 0):
        counts = tl.zeros([BINS], dtype=tl.int32)
        above = tl.minimum(low, bound.dtype.primitive_bitwidth - 1)
        first_digit = low == bound.dtype.primitive_bitwidth
        low -= DIGIT_BITS
        for start in range(0, number, CHUNK):
            n = start + tl.arange(0, CHUNK)
            bits = unsigned(tl.load(keys + n, mask=n < number, other=0))
            is_open = (n < number) & (first_digit | ((bits >> above) == (fixed >> above)))
            counts += tl.histogram(((bits >> low) & (BINS - 1)).to(tl.int32), BINS, mask=is_open)
        for start in range(0, stop, SIZE):
            column, inside = _column(listed, start, stop, LISTED, SIZE)
            key = ordered(scores(block, scale, shift, column, column, inside))
            bits = unsigned(key)
            is_open = (key >= bound) & (first_digit | ((bits >> above) == (fixed >> above)))
            if tl.max(is_open.to(tl.int32)) > 0:
                counts += tl.histogram(((bits >> low) & (BINS - 1)).to(tl.int32), BINS, mask=is_open)
        value, same, over = kth_digit(counts, left)
        left -= over
        fixed |= value.to(fixed.dtype) << low
        done = same <= left
    least = tl.maximum(unsigned(fixed), lowest(bound))
    # Of those that equal the least key this many are kept: all, if no more are left.
    ties = tl.where(done, 2147483647, left)
    made = tl.full([], 0, tl.int32)
    equals = tl.full([], 0, tl.int32)
    kth = highest(bound)
    for start in range(0, number, CHUNK):
        n = start + tl.arange(0, CHUNK)
        key = tl.load(keys + n, mask=n < number, other=0)
        id = tl.load(ids + n, mask=n < number, other=0)
        value = tl.load(values + n, mask=n < number, other=0)
        equal = (n < number) & (key == least)
        stays = ((n < number) & (key > least)) | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= ties))
        place = made + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of the chunk is read before its front is overwritten
        tl.store(keys + place, key, mask=stays)
        tl.store(ids + place, id, mask=stays)
        tl.store(values + place, value, mask=stays)
        kth = tl.minimum(kth, tl.min(tl.where(stays, key, highest(bound))))
        made += tl.sum(stays.to(tl.int32))
        equals += tl.sum(equal.to(tl.int32))
    for start in range(0, stop, SIZE):
        column, inside = _column(listed, start, stop, LISTED, SIZE)
        key = ordered(scores(block, scale, shift, column, column, inside))
        equal = inside & (key >= bound) & (key == least)
        better = inside & (key >= bound) & (key > least)
        if tl.max((equal | better).to(tl.int32)) > 0:
            stays = better | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= ties))
            place = made + tl.cumsum(stays.to(tl.int32), 0) - 1
            tl.store(keys + place, key, mask=stays)
            tl.store(ids + place, first_id + column, mask=stays)
            tl.store(values + place, wide(tl.load(pre + column, mask=stays, other=0)), mask=stays)
            kth = tl.minimum(kth, tl.min(tl.where(stays, key, highest(bound))))
            made += tl.sum(stays.to(tl.int32))
            equals += tl.sum(equal.to(tl.int32))
    # Ids ascend: a later number that equals the k-th best loses.
    bound = tl.where(made == k, tl.minimum(kth + 1, highest(kth)), bound)
    return made, bound


@triton.jit
def pack(ids, values, mask, counts, starts, token, feature, pre, places, MASKED: tl.constexpr):
    """Copy each token's pool behind those before it; of some pools, only what a mask [B, places] says.

    Args:
        starts: [B], where each token's pairs begin in the result.
    """
    row = tl.program_id(0).to(tl.int64)
    number, to = tl.load(counts + row), tl.load(starts + row)
    for start in range(0, number, CHUNK):
        n = start + tl.arange(0, CHUNK)
        inside = n < number
        at = row * places + n
        stays = inside
        if MASKED:
            stays = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        place = to + tl.cumsum(stays.to(tl.int64), 0) - 1
        tl.store(token + place, row + n * 0, mask=stays)
        tl.store(feature + place, tl.load(ids + at, mask=stays, other=0).to(tl.int64), mask=stays)
        tl.store(pre + place, tl.load(values + at, mask=stays, other=0).to(pre.dtype.element_ty), mask=stays)
        to += tl.sum(stays.to(tl.int64))
