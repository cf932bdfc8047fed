"""Marks the numbers of a block that reach a bound, and lists where they stand: device code, compiled by Triton.

A mark is a bit. To set it takes about six instructions for each number, where a place in a list takes thirty; so all
numbers are marked, and only marks become places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clt_kernels.gpu.select.batch import AGAIN, CHUNK, MARKED, settle, tile_of
from clt_kernels.gpu.select.keys import bits_set, lowest, marks_of, number_of, ordered, scores, unsigned, write_down


@triton.jit(do_not_specialize=["k", "slack", "first_id", "end", "digits", "last_of_id", "last_low", "capacity"])
def mark(
    block, scale, shift, bound, state, counts, marks,
    k, slack, first_id, end, digits, last_of_id, last_low, size, width, capacity,
    TILE: tl.constexpr,
):  # fmt: skip
    """Set a bit for each number that reaches the bound; after the digits were counted, that which they gave.

    Args:
        marks: [rows, tiles · TILE / 8] bytes.
        digits: how many were counted; 0: none yet.
    """
    first_id = tl.cast(first_id, tl.int64)
    least = tl.load(bound)
    back_so_far = tl.full([], 0, tl.int64)
    todo = least > lowest(least)
    if digits > 0:
        todo = tl.load(counts + MARKED) > capacity
        if todo:
            key_so_far, back_so_far, _, _ = settle(state, counts, digits, k, slack, last_of_id, last_low)
            least = tl.maximum(least, unsigned(key_so_far.to(least.dtype)))
    elif (todo == 0) & (tl.program_id(0) == 0):
        # There is no bound yet: all would be marked.
        tl.store(counts + MARKED, capacity + 1)
    if todo:
        if back_so_far > 0:
            _mark(block, scale, shift, marks, least, back_so_far, first_id, end, size, width, True, TILE)
        else:
            _mark(block, scale, shift, marks, least, back_so_far, first_id, end, size, width, False, TILE)


@triton.jit
def _mark(
    block, scale, shift, marks, least, back_so_far, first_id, end, size, width,
    TIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, column, first, step, rows = tile_of(size, width, TILE)
    # Compared as numbers, NaN is not below anything, and is marked.
    threshold = number_of(least)
    marks += tile * (TILE // 8) + tl.arange(0, TILE // 8)
    bytes_of_row = tl.cdiv(width, TILE) * (TILE // 8)
    for row in range(first, rows, step):
        at = row * width + column
        inside = (column < width) & (at < size)
        score = scores(block, scale, shift, at, column, inside)
        marked = (score < threshold) == 0
        if TIES:
            marked &= (ordered(score) > least) | (end - (first_id + at) >= back_so_far)
        tl.store(marks + row * bytes_of_row, marks_of(marked, TILE).to(tl.uint8))


@triton.jit(do_not_specialize=["of", "capacity"])
def list_marked(marks, found_at, counts, words, words_of_row, width, of, capacity):
    """Write down where the marked numbers stand, as far as there is capacity, and count all.

    Args:
        marks: [words], 32-bit. of: which count, MARKED or AGAIN.
    """
    SOME: tl.constexpr = CHUNK // 2
    done = (of == MARKED) & (tl.load(counts + MARKED) > capacity)
    if (of == AGAIN) & (tl.load(counts + MARKED) <= capacity):
        done = True
    if not done:
        for start in range(tl.program_id(0) * SOME, words, tl.num_programs(0) * SOME):
            n = start + tl.arange(0, SOME)
            bits = tl.load(marks + n, mask=n < words, other=0)
            number = bits_set(bits)
            total = tl.sum(number)
            if total > 0:
                places = tl.atomic_add(counts + of, total, sem="relaxed") + tl.cumsum(number, 0) - number
                write_down(bits, (n // words_of_row) * width + (n % words_of_row) * 32, places, capacity, found_at)
