"""The sparse products as Triton programs.

`decode` goes by tokens: a program sums the rows of one token's pairs for one target, some columns of them, several rows
at a time. Programs that run together share the target and the columns, so that their rows come from the L2 cache.

Both gradients go by features: a program holds one row of the weight and walks the tokens of its pairs. What it reads of
a token's side serves the row's gradient and the pair's dot product at once. Features of very many tokens are cut into
pieces, whose sums are added in order.

Each number is the sum of one program, in a fixed order and without atomics: results do not change from run to run.
Nothing is read back, and the number of programs depends only on shapes.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows, J targets of a feature at most.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(
    out, values, place, starts, weight, stride,
    L: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, PER_TARGET: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[b, t, columns], of the pairs of token b from layers up to t; of layer t alone if OWN.

    place [N]: a pair's row for target t is place + t * stride. starts [B, L + 1]: where a token's pairs of each layer
    begin.
    """
    b, t = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    first = starts + b.to(tl.int64) * (L + 1)
    low = tl.load(first + (t if OWN else 0))
    high = tl.load(first + t + 1)
    total = tl.zeros([PAIRS, COLUMNS], dtype=WIDE)
    for begin in range(low, high, PAIRS):
        n = begin + tl.arange(0, PAIRS)
        there = n < high
        # Rows are int32, but rows * D may be more than 2^31 numbers.
        row = (tl.load(place + n, mask=there, other=0) + t * stride).to(tl.int64)
        value = tl.load(values + (n.to(tl.int64) * L + t if PER_TARGET else n), mask=there, other=0).to(WIDE)
        both = there[:, None] & inside[None, :]
        rows = tl.load(weight + row[:, None] * D + column[None, :], mask=both, other=0)
        total += value[:, None] * rows.to(WIDE)
    tl.store(out + (b.to(tl.int64) * L + t) * D + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _walk(
    total, weights, low, high, values, token, dense, dots, t, column, inside,
    L: tl.constexpr, D: tl.constexpr, PER_TARGET: tl.constexpr, ROWS: tl.constexpr, DOTS: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tokens of one feature's pairs low to high for target t: adds to `total` [TOKENS, D], writes `dots` [N]."""
    for begin in range(low, high, TOKENS):
        i = begin + tl.arange(0, TOKENS)
        there = i < high
        at = (tl.load(token + i, mask=there, other=0).to(tl.int64) * L + t) * D
        both = there[:, None] & inside[None, :]
        side = tl.load(dense + at[:, None] + column[None, :], mask=both, other=0).to(WIDE)
        if ROWS:
            value = tl.load(values + (i.to(tl.int64) * L + t if PER_TARGET else i), mask=there, other=0).to(WIDE)
            total += value[:, None] * side
        if DOTS:
            tl.store(dots + i, tl.sum(side * weights[None, :], 1), mask=there)
    return total


@triton.jit
def pieces(
    partial, dots, values, token, start, piece_start, owner, weight, dense, first, step, stride, count, N,
    L: tl.constexpr, F: tl.constexpr, D: tl.constexpr, J: tl.constexpr, PER_TARGET: tl.constexpr, ROWS: tl.constexpr,
    DOTS: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A piece of a feature's tokens, for one target: its sum goes to partial [pieces, J, D]."""
    piece, j = tl.program_id(0), tl.program_id(1)
    number = tl.load(owner + piece)
    if number < L * F:
        s = number // F
        if j < tl.load(count + s):
            column = tl.arange(0, WIDTH)
            inside = column < D
            low = tl.load(start + number) + (piece - tl.load(piece_start + number)) * PIECE
            high = tl.minimum(low + PIECE, tl.load(start + number + 1))
            row = tl.load(first + s) + number % F * tl.load(step + s) + j * tl.load(stride + s)
            total = tl.zeros([TOKENS, WIDTH], dtype=WIDE)
            weights = tl.zeros([WIDTH], dtype=WIDE)
            if DOTS:
                weights = tl.load(weight + row * D + column, mask=inside, other=0).to(WIDE)
            total = _walk(
                total, weights, low, high, values, token, dense, dots + j.to(tl.int64) * N, s + j, column, inside,
                L, D, PER_TARGET, ROWS, DOTS, TOKENS, WIDE,
            )  # fmt: skip
            if ROWS:
                tl.store(partial + (piece.to(tl.int64) * J + j) * D + column, tl.sum(total, 0), mask=inside)


@triton.jit
def gradients(
    out, squares, dots, partial, values, token, start, piece_start, weight, dense,
    bases, steps, use_start, sources, targets, N,
    L: tl.constexpr, F: tl.constexpr, D: tl.constexpr, J: tl.constexpr, PER_TARGET: tl.constexpr, ROWS: tl.constexpr,
    DOTS: tl.constexpr, SQUARES: tl.constexpr, OVERWRITE: tl.constexpr, HOT: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row of a block, over the (source, target)s that use it; features of more than HOT pairs from their pieces."""
    f, block = tl.program_id(0), tl.program_id(1)
    use_low, use_high = tl.load(use_start + block), tl.load(use_start + block + 1)
    pairs = 0
    for m in range(use_low, use_high):
        number = tl.load(sources + m) * F + f
        pairs += tl.load(start + number + 1) - tl.load(start + number)
    if pairs > 0 or OVERWRITE:
        column = tl.arange(0, WIDTH)
        inside = column < D
        row = tl.load(bases + block) + f * tl.load(steps + block)  # int64, as the two tables are
        total = tl.zeros([TOKENS, WIDTH], dtype=WIDE)
        if pairs > 0:
            weights = tl.zeros([WIDTH], dtype=WIDE)
            if DOTS:
                weights = tl.load(weight + row * D + column, mask=inside, other=0).to(WIDE)
            for m in range(use_low, use_high):
                s, t = tl.load(sources + m), tl.load(targets + m)
                number = s * F + f
                low, high = tl.load(start + number), tl.load(start + number + 1)
                if HOT > 0 and high - low > HOT:
                    if ROWS:
                        last = tl.load(piece_start + number + 1)
                        for piece in range(tl.load(piece_start + number), last, TOKENS):
                            some = piece + tl.arange(0, TOKENS)
                            at = partial + (some.to(tl.int64) * J + t - s)[:, None] * D + column[None, :]
                            total += tl.load(at, mask=(some < last)[:, None] & inside[None, :], other=0)
                else:
                    total = _walk(
                        total, weights, low, high, values, token, dense, dots + (t - s).to(tl.int64) * N, t, column,
                        inside, L, D, PER_TARGET, ROWS, DOTS, TOKENS, WIDE,
                    )  # fmt: skip
        if ROWS:
            address = out + row * D + column
            result = tl.sum(total, 0)
            if not OVERWRITE:
                result += tl.load(address, mask=inside, other=0).to(WIDE)
            kept = result.to(out.dtype.element_ty)
            tl.store(address, kept, mask=inside)
            if SQUARES:
                # Of the numbers as they are stored, so that they are the squares of the gradient that others read.
                number = kept.to(tl.float32)
                tl.store(squares + row, tl.sum(number * number))


@triton.jit
def add_dots(
    out, dots, order, feature, count, filled, N,
    L: tl.constexpr, F: tl.constexpr, PER_TARGET: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out[n], or out[n, t]: the dot products of each pair with its rows, dots [J, N] in feature order, added up.

    filled: how many of the N are pairs, where COUNTED. Empty places stand at the end of both orders and get 0.
    """
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = i < N
    n = tl.load(order + i, mask=there, other=0)
    s = tl.load(feature + n, mask=there, other=0) // F
    targets = tl.load(count + s)
    if COUNTED:
        targets = tl.where(i < tl.load(filled), targets, 0)
    total = tl.zeros([TILE], dtype=WIDE)
    for t in range(L):
        j = t - s
        dot = tl.load(dots + j * N + i, mask=there & (j >= 0) & (j < targets), other=0)
        if PER_TARGET:
            tl.store(out + n * L + t, dot, mask=there)
        else:
            total += dot
    if not PER_TARGET:
        tl.store(out + n, total, mask=there)


@triton.jit
def add_values(out, values, start, TILE: tl.constexpr, WIDE: tl.constexpr):
    """out[feature]: the sum of the values of its pairs, in order."""
    number = tl.program_id(0)
    total = tl.zeros([TILE], dtype=WIDE)
    for begin in range(tl.load(start + number), tl.load(start + number + 1), TILE):
        i = begin + tl.arange(0, TILE)
        total += tl.load(values + i, mask=i < tl.load(start + number + 1), other=0).to(WIDE)
    tl.store(out + number, tl.sum(total))
