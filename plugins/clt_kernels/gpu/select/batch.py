"""The k best of one row of numbers that comes in blocks, found by counting digits: device code, compiled by Triton.

A block is shown in a fixed number of launches; the host reads nothing back.

1. `mark` sets a bit for each number that reaches the bound, the k-th best so far; few do. `list_marked` makes a list of
   their places.
2. `count_digit`, once for each digit, counts the next digit of what was kept so far and of what is listed. Every launch
   first fixes the digit that the launch before it counted. As soon as hardly more than k numbers are left it stops: the
   launches that remain exit at once.
3. `keep` copies what is left, and sets the bound.

If the list is too short (the first block, which has no bound yet; a layer of higher scores; a block of equal numbers),
step 2 counts the block itself, and step 1 is repeated with the bound that it found. The digits are those of the score
and then those of the id, of which lower ones are better. So what is left fits, however many scores are equal.

A list is in no fixed order, because programs take their places in it by an atomic. It is a fixed set, however, and is
sorted at the end.

Shapes: C numbers in a block, seen as [C / width, width]; a tile is a stretch of a row of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clt_kernels.gpu.select.keys import (
    highest,
    kth_digit,
    ordered,
    scores,
    unsigned,
    wide,
)

DIGIT_BITS = 6
BINS: tl.constexpr = tl.constexpr(1 << DIGIT_BITS)
AT_ONCE = 2048
"""Listed numbers that a program looks at together; words of marks: half as many."""
CHUNK: tl.constexpr = tl.constexpr(AT_ONCE)

# A selection's state: 4 numbers after each digit.
SLOT: tl.constexpr = tl.constexpr(4)
KEY: tl.constexpr = tl.constexpr(0)
"""The key's digits that are fixed, as an unsigned number; the others are 0."""
BACK: tl.constexpr = tl.constexpr(1)
"""The fixed digits of the id, counted from the last id backwards."""
LEFT: tl.constexpr = tl.constexpr(2)
"""How many are still to be found among the numbers with these digits."""
DONE: tl.constexpr = tl.constexpr(3)
"""After how many digits few enough were left; 0: not yet."""

# Its counts, int32: some numbers, then [digits, BINS].
KEPT: tl.constexpr = tl.constexpr(0)
"""How many are kept after the block."""
MARKED: tl.constexpr = tl.constexpr(1)
"""How many numbers of the block reach the bound."""
AGAIN: tl.constexpr = tl.constexpr(2)
"""How many reach the bound that the digits gave, where the list was too short before."""
HEAD = 16
BY_DIGIT: tl.constexpr = tl.constexpr(HEAD)
"""Where the digits' counts begin."""


@triton.jit
def settle(state, counts, number, k, slack, last_of_id, last_low):
    """The state after `number` digits, of which the last was counted by the launch before: (KEY, BACK, LEFT, DONE).

    Program 0 stores it for the launches that follow.
    """
    key = tl.full([], 0, tl.int64)
    back = tl.full([], 0, tl.int64)
    left = tl.full([], 0, tl.int64) + k
    done = tl.full([], 0, tl.int64)
    if number > 0:
        last = state + (number - 1) * SLOT
        key, back, left, done = tl.load(last + KEY), tl.load(last + BACK), tl.load(last + LEFT), tl.load(last + DONE)
        if done == 0:
            of_digit = tl.load(counts + BY_DIGIT + (number - 1) * BINS + tl.arange(0, BINS))
            value, same, above = kth_digit(of_digit, left)
            left -= above
            digit = value.to(tl.int64) << last_low
            if last_of_id != 0:
                back |= digit
            else:
                key |= digit
            if same <= left + slack:
                done += number
    if tl.program_id(0) == 0:
        now = state + number * SLOT
        tl.store(now + KEY, key)
        tl.store(now + BACK, back)
        tl.store(now + LEFT, left)
        tl.store(now + DONE, done)
    return key, back, left, done


@triton.jit
def tile_of(size, width, TILE: tl.constexpr):
    """Which part of a block a program looks at: (tile of a row, its columns [TILE], first row, step, rows)."""
    tiles = tl.cdiv(width, TILE)
    tile = tl.program_id(0) % tiles
    return (
        tile,
        tile * TILE + tl.arange(0, TILE),
        tl.program_id(0) // tiles,
        tl.num_programs(0) // tiles,
        tl.cdiv(size, width),
    )


@triton.jit
def _digit(key, id, key_so_far, back_so_far, end, number, of_id, low, above):
    """The next digit of some numbers, and which of them have all digits that are fixed."""
    bits = unsigned(key)
    fixed = key_so_far.to(bits.dtype)
    if of_id != 0:
        back = end - id
        digit = ((back >> low) & (BINS - 1)).to(tl.int32)
        is_open = (bits == fixed) & ((back >> above) == (back_so_far >> above))
    else:
        digit = ((bits >> low) & (BINS - 1)).to(tl.int32)
        is_open = ((bits >> above) == (fixed >> above)) | (number == 0)
    return digit, is_open


@triton.jit(
    do_not_specialize=[
        "k", "slack", "first_id", "end", "number", "of_id", "low", "above", "last_of_id", "last_low", "capacity"
    ]
)  # fmt: skip
def count_digit(
    block, scale, shift, bound, kept_keys, kept_ids, kept, found_at, found_keys, state, counts,
    k, slack, first_id, end, number, of_id, low, above, last_of_id, last_low, size, width, capacity,
    TILE: tl.constexpr,
):  # fmt: skip
    """Count a digit of what was kept so far and of what is listed, or of the block if the list was too short.

    Args:
        kept: [1], how many were kept so far.
        number: how many digits were counted before.
        of_id, low: which digit: of the id or the key, from which bit. above: the lowest bit of the one before it.
    """
    first_id = tl.cast(first_id, tl.int64)
    key_so_far, back_so_far, left, done = settle(state, counts, number, k, slack, last_of_id, last_low)
    if done == 0:
        total = tl.zeros([BINS], dtype=tl.int32)
        programs = tl.num_programs(0)
        stop = tl.load(kept)
        for start in range(tl.program_id(0) * CHUNK, stop, programs * CHUNK):
            n = start + tl.arange(0, CHUNK)
            inside = n < stop
            key, id = tl.load(kept_keys + n, mask=inside, other=0), tl.load(kept_ids + n, mask=inside, other=0)
            digit, is_open = _digit(key, id, key_so_far, back_so_far, end, number, of_id, low, above)
            total += tl.histogram(digit, BINS, mask=inside & is_open)
        found = tl.load(counts + MARKED)
        if found <= capacity:
            for start in range(tl.program_id(0) * CHUNK, found, programs * CHUNK):
                n = start + tl.arange(0, CHUNK)
                inside = n < found
                at = tl.load(found_at + n, mask=inside, other=0)
                if number == 0:
                    key = ordered(scores(block, scale, shift, at, at % width, inside))
                    tl.store(found_keys + n, key, mask=inside)
                else:
                    key = tl.load(found_keys + n, mask=inside, other=0)
                digit, is_open = _digit(key, first_id + at, key_so_far, back_so_far, end, number, of_id, low, above)
                total += tl.histogram(digit, BINS, mask=inside & is_open)
        else:
            least = tl.load(bound)
            tile, column, first, step, rows = tile_of(size, width, TILE)
            for row in range(first, rows, step):
                at = row * width + column
                inside = (column < width) & (at < size)
                key = ordered(scores(block, scale, shift, at, column, inside))
                digit, is_open = _digit(key, first_id + at, key_so_far, back_so_far, end, number, of_id, low, above)
                is_open &= key >= least
                if tl.max(is_open.to(tl.int32)) > 0:
                    total += tl.histogram(digit, BINS, mask=is_open)
        bins = tl.arange(0, BINS)
        tl.atomic_add(counts + BY_DIGIT + number * BINS + bins, total, mask=total > 0, sem="relaxed")


@triton.jit
def new_places(keep, counts):
    """A place of its own in what is kept, for each number to be kept."""
    number = tl.sum(keep.to(tl.int32))
    return tl.atomic_add(counts + KEPT, number, sem="relaxed") + tl.cumsum(keep.to(tl.int32), 0) - 1


@triton.jit(
    do_not_specialize=["k", "slack", "first_id", "end", "digits", "key_digits", "last_of_id", "last_low", "capacity"]
)
def keep(
    block, scale, shift, pre, bound, kept_keys, kept_ids, kept_values, kept, found_at,
    state, counts, new_keys, new_ids, new_values, new_bound,
    k, slack, first_id, end, digits, key_digits, last_of_id, last_low, width, capacity,
):  # fmt: skip
    """Copy what has all digits that are fixed, or better ones, and set the bound.

    Args:
        key_digits: how many of the digits are of the key.
    """
    first_id = tl.cast(first_id, tl.int64)
    key_so_far, back_so_far, left, done = settle(state, counts, digits, k, slack, last_of_id, last_low)
    old_least = tl.load(bound)
    least = unsigned(key_so_far.to(old_least.dtype))
    programs = tl.num_programs(0)
    if tl.program_id(0) == 0:
        # Ids ascend: once the whole key of the k-th best is known, a later number that equals it loses.
        fixed = tl.where(done > 0, done, digits)
        strictly = least + (fixed >= key_digits).to(least.dtype)
        tl.store(new_bound, tl.minimum(tl.maximum(strictly, old_least), highest(least)))
    stop = tl.load(kept)
    for start in range(tl.program_id(0) * CHUNK, stop, programs * CHUNK):
        n = start + tl.arange(0, CHUNK)
        inside = n < stop
        key, id = tl.load(kept_keys + n, mask=inside, other=0), tl.load(kept_ids + n, mask=inside, other=0)
        stays = inside & ((key > least) | ((key == least) & (end - id >= back_so_far)))
        place = new_places(stays, counts)
        tl.store(new_keys + place, key, mask=stays)
        tl.store(new_ids + place, id, mask=stays)
        tl.store(new_values + place, tl.load(kept_values + n, mask=stays, other=0), mask=stays)
    found = tl.load(counts + MARKED)
    if found > capacity:
        found = tl.load(counts + AGAIN)
    for start in range(tl.program_id(0) * CHUNK, found, programs * CHUNK):
        n = start + tl.arange(0, CHUNK)
        inside = n < found
        at = tl.load(found_at + n, mask=inside, other=0)
        id = first_id + at
        key = ordered(scores(block, scale, shift, at, at % width, inside))
        stays = inside & ((key > least) | ((key == least) & (end - id >= back_so_far)))
        place = new_places(stays, counts)
        tl.store(new_keys + place, key, mask=stays)
        tl.store(new_ids + place, id, mask=stays)
        tl.store(new_values + place, wide(tl.load(pre + at, mask=stays, other=0)), mask=stays)
