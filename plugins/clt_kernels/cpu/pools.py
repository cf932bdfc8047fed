"""The loops of the selection that look at every number: pools of candidates.

A pool keeps candidates in the order in which they came, and a bound that a new one must beat. Most numbers do not: they
are compared many at a time and passed over together. A full pool is cut to little more than its k best, and what was
cut off is the new bound; the last cut, in `results`, is exact. Of equal keys the earlier one is kept: a later one that
only equals the bound loses.

The pools of a batch keep its k best together, and not k each: otherwise each of two threads would have as many
candidates as one thread alone.

Shapes: B tokens, L layers, F features per layer, k kept per pool or batch, C candidates, P pools.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numba.extending import overload

from clt_kernels.cpu.bits import GROUP, above, lowest_bit, widen
from clt_kernels.cpu.compiled import compiled
from clt_kernels.cpu.cut import PARTS, bits_of, cut_near, key_of, kth

STRETCH, SHORT_STRETCH = 1024, 256
"""Numbers that are looked at together: they stay in the first cache. A pool has space for as many more than make it
full, since it is cut between stretches; so a pool of a token, in which k is small, has short ones."""

SAMPLE = 4096
"""Numbers of a pool's first block from which its first bound is estimated."""


def as_they_are(pre: Any, low: Any, high: Any, out: Any) -> Any:
    """pre[low:high] as numbers to compute with: a view of it, or widened into `out`."""


@overload(as_they_are)
def _compile_as_they_are(pre, low, high, out):
    if pre.dtype == out.dtype:
        return lambda pre, low, high, out: pre[low:high]

    def widened(pre, low, high, out):
        for i in range(high - low):
            out[i] = widen(pre[low + i])
        return out[: high - low]

    return widened


@compiled(fastmath=False)  # each operation is rounded, as torch does it: the same numbers are kept
def _scores(pre, low, high, scale, shift, out):
    """pre * scale + shift of pre[low:high], which may be in `out`; a scale or shift of no entries is none."""
    n_features = max(len(scale), len(shift))
    if n_features == 0:
        return as_they_are(pre, low, high, out)
    begin = low
    while begin < high:
        # Up to the end of a token's features.
        f = begin % n_features
        end = min(high, begin + n_features - f)
        part, made = pre[begin:end], out[begin - low : end - low]
        if len(shift) == 0:
            for i in range(len(part)):
                made[i] = widen(part[i]) * scale[f + i]
        elif len(scale) == 0:
            for i in range(len(part)):
                made[i] = widen(part[i]) + shift[f + i]
        else:
            for i in range(len(part)):
                made[i] = widen(part[i]) * scale[f + i] + shift[f + i]
        begin = end
    return out[: high - low]


@compiled()
def _see(pre, score, begin, end, first, scale, shift, k, keys, ids, values, count, bound, numbers, counts, same):
    """Add what beats the bound among score[begin:end] to a pool; returns its number of candidates and its bound."""
    full = keys.size - len(numbers)
    limit = same[:1]
    for low in range(begin, end, len(numbers)):
        high = min(low + len(numbers), end)
        made = _scores(score, low, high, scale, shift, numbers)
        bits = made.view(keys.dtype)
        limit[0] = bits_of(bound, keys)
        least = limit.view(numbers.dtype)[0]
        groups = (high - low) // GROUP * GROUP
        for start in range(0, groups, GROUP):
            left = above(made, start, least)
            while left != 0:
                i = start + lowest_bit(left)
                left &= left - np.uint64(1)
                # Of NaN the key decides. A branch would be mispredicted while the bound is not yet high.
                key = key_of(bits[i])
                keys[count], ids[count], values[count] = key, first + low + i, widen(pre[low + i])
                count += key > bound
        for i in range(groups, high - low):
            key = key_of(bits[i])
            keys[count], ids[count], values[count] = key, first + low + i, widen(pre[low + i])
            count += key > bound
        if count >= full and count > k:
            count, bound = cut_near(keys, ids, values, count, k, bound, counts, same)
    return count, bound


@compiled()
def sampled_bound(score, scale, shift, k, keys, numbers):
    """A bound that somewhat more than k of all in `score` beat, if a sample is like them.

    Without it a pool takes all numbers at first, and is cut again and again while its bound rises.
    """
    sample, same = np.empty(SAMPLE, keys.dtype), np.empty(SAMPLE, keys.dtype)
    for i in range(SAMPLE):
        # Multiples of the golden section are spread evenly, and over all features.
        low = np.int64((i * 0.6180339887498949) % 1 * len(score))
        made = _scores(score, low, low + 1, scale, shift, numbers)
        sample[i] = key_of(made.view(keys.dtype)[0])
    return kth(sample, SAMPLE, _rank(k / len(score)), np.empty(PARTS, np.int32), same)[0]


@compiled()
def _rank(share):
    """The rank in a sample below which that share of all is, within four standard deviations."""
    rank = SAMPLE * share
    return min(np.int64(rank + 4 * np.sqrt(rank) + 4), SAMPLE)


@compiled()
def bound_of_all(k, total, keys, count):
    """A key that k of the `total` candidates in all pools are above, and few more; if none is found, the lowest."""
    sample, same = np.empty(SAMPLE, keys.dtype), np.empty(SAMPLE, keys.dtype)
    pool, before = 0, 0
    for i in range(SAMPLE):
        place = i * total // SAMPLE
        while place - before >= count[pool]:
            before += count[pool]
            pool += 1
        sample[i] = keys[pool, place - before]
    bound, _ = kth(sample, SAMPLE, _rank(k / total), np.empty(PARTS, np.int32), same)
    beaten = 0
    for pool in range(len(count)):
        for i in range(count[pool]):
            beaten += keys[pool, i] > bound
    return bound if beaten >= k else np.iinfo(keys.dtype).min


@compiled(parallel=True)
def see_batch(pre, score, tokens, first, scale, shift, k, keys, ids, values, count, bound):
    """Show a block, B · F numbers, to pools that have an equal part of the tokens each."""
    pools = len(count)
    n_features = len(pre) // tokens
    for pool in prange(pools):
        numbers = np.empty(STRETCH, values.dtype)
        counts, same = np.empty(PARTS, np.int32), np.empty(keys.shape[1], keys.dtype)
        begin, end = tokens * pool // pools * n_features, tokens * (pool + 1) // pools * n_features
        count[pool], bound[pool] = _see(
            pre, score, begin, end, first, scale, shift, k, keys[pool], ids[pool], values[pool], count[pool],
            bound[pool], numbers, counts, same,
        )  # fmt: skip


@compiled(parallel=True)
def see_tokens(pre, score, tokens, first, scale, shift, k, keys, ids, values, count, bound, threads):
    """Show a block, B · F numbers, to a pool for each token."""
    n_features = len(pre) // tokens
    for thread in prange(threads):
        numbers = np.empty(SHORT_STRETCH, values.dtype)
        counts, same = np.empty(512, np.int32), np.empty(keys.shape[1], keys.dtype)
        for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            begin, end = token * n_features, (token + 1) * n_features
            count[token], bound[token] = _see(
                pre, score, begin, end, first - begin, scale, shift, k, keys[token], ids[token], values[token],
                count[token], bound[token], numbers, counts, same,
            )  # fmt: skip
