"""The loops of the selection: pools of candidates, and results in order.

A pool keeps candidates in the order in which they came, and a bound that a new one must beat. Most numbers do not: they
are compared many at a time and passed over together. A full pool is cut to little more than its k best, and what was
cut off is the new bound; the last cut is exact. Of equal keys the earlier one is kept: a later one that only equals the
bound loses.

Shapes: B tokens, L layers, F features per layer, k kept per pool, C candidates, P pools, N results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numba.extending import overload

from clt_kernels.cpu.bits import GROUP, above, lowest_bit, widen
from clt_kernels.cpu.compiled import compiled
from clt_kernels.cpu.cut import PARTS, bits_of, cut, cut_near, key_of, kth

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
def _sampled_bound(score, begin, end, scale, shift, k, bound, numbers, counts, same):
    """A bound that somewhat more than k of score[begin:end] beat, if a sample is like them.

    Without it a pool takes all numbers at first, and is cut again and again while its bound rises. Where a sample says
    little, it is the bound that was given.
    """
    share = k / (end - begin)
    if end - begin < 16 * SAMPLE or len(same) < 2 * SAMPLE or share > 0.6:
        return bound
    keys = same[:SAMPLE]
    for i in range(SAMPLE):
        # Multiples of the golden section are spread evenly, and over all features.
        low = begin + np.int64((i * 0.6180339887498949) % 1 * (end - begin))
        made = _scores(score, low, low + 1, scale, shift, numbers)
        keys[i] = key_of(made.view(keys.dtype)[0])
    rank = SAMPLE * share
    rank += 4 * np.sqrt(rank) + 4  # four standard deviations of what the sample may be off
    sampled, _ = kth(keys, SAMPLE, np.int64(rank), counts, same[SAMPLE:])
    return max(bound, sampled)


@compiled(parallel=True)
def see_batch(pre, score, tokens, first, scale, shift, k, keys, ids, values, count, bound):
    """Show a block, B · F numbers, to pools that have an equal part of the tokens each."""
    pools = len(count)
    n_features = len(pre) // tokens
    for pool in prange(pools):
        numbers = np.empty(STRETCH, values.dtype)
        counts, same = np.empty(PARTS, np.int32), np.empty(keys.shape[1], keys.dtype)
        begin, end = tokens * pool // pools * n_features, tokens * (pool + 1) // pools * n_features
        lowest, started = bound[pool], count[pool]
        if started == 0:
            bound[pool] = _sampled_bound(score, begin, end, scale, shift, k, lowest, numbers, counts, same)
        while True:
            count[pool], bound[pool] = _see(
                pre, score, begin, end, first, scale, shift, k, keys[pool], ids[pool], values[pool], count[pool],
                bound[pool], numbers, counts, same,
            )  # fmt: skip
            if started > 0 or count[pool] >= k or bound[pool] == lowest:
                break
            # The sample was not like the block: what was passed over may be among the best.
            count[pool], bound[pool] = 0, lowest


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


@compiled()
def cut_tokens(k, keys, ids, values, count):
    """Cut each token's pool to its k best."""
    counts, same = np.empty(512, np.int32), np.empty(keys.shape[1], keys.dtype)
    for token in range(len(count)):
        if count[token] > k:
            cut(keys[token], ids[token], values[token], count[token], k, counts, same)
            count[token] = k


@compiled()
def join(k, keys, ids, values, count):
    """The k best of all pools of a batch: keys, ids and values, pool after pool."""
    total = count.sum()
    number = min(k, total)
    best_keys, best_ids, best_values = (
        np.empty(number + 1, keys.dtype),  # one more: what is not kept is written too, and overwritten
        np.empty(number + 1, ids.dtype),
        np.empty(number + 1, values.dtype),
    )
    bound, last = keys.dtype.type(0), ids.dtype.type(0)
    if total > k:
        every = keys[0, : count[0]]
        if len(count) > 1:
            every, filled = np.empty(total, keys.dtype), 0
            for pool in range(len(count)):
                every[filled : filled + count[pool]] = keys[pool, : count[pool]]
                filled += count[pool]
        bound, left = kth(every, total, k, np.empty(PARTS, np.int32), np.empty(total, keys.dtype))
        # Of those that equal the k-th best, the lowest ids: they may lie in any pool.
        equal, filled = np.empty(total, ids.dtype), 0
        for pool in range(len(count)):
            for i in range(count[pool]):
                equal[filled] = ids[pool, i]
                filled += keys[pool, i] == bound
        last = np.sort(equal[:filled])[left - 1]
    kept = 0
    for pool in range(len(count)):
        for i in range(count[pool]):
            key, id = keys[pool, i], ids[pool, i]
            best_keys[kept], best_ids[kept], best_values[kept] = key, id, values[pool, i]
            kept += (total <= k) | (key > bound) | ((key == bound) & (id <= last))
    return best_keys[:number], best_ids[:number], best_values[:number]


@compiled()
def _walk(id, end, layer, token, tokens, n_features):
    """The end of the row of `id` (the first id after it), and its layer and token, from those of the id before it.

    It is most often the same row or the next one: dividing each id would take longer.
    """
    if end - n_features <= id < end:
        return end, layer, token
    if end <= id < end + n_features and token + 1 < tokens:
        return end + n_features, layer, token + 1
    row = np.int64(id) // n_features
    layer = row // tokens
    return (row + 1) * n_features, layer, row - layer * tokens


@compiled()
def by_token(ids, values, tokens, n_features):
    """Token, feature (layer * F + f) and value of ids (layer * B + token) * F + f, by token: a counting sort.

    The ids of a token must ascend.
    """
    number = len(ids)
    start = np.zeros(tokens + 1, np.int64)
    end, layer, token = n_features, 0, 0
    for i in range(number):
        end, layer, token = _walk(ids[i], end, layer, token, tokens, n_features)
        start[token + 1] += 1
    for t in range(tokens):
        start[t + 1] += start[t]
    token_of, feature_of, value_of = np.empty(number, np.int64), np.empty(number, np.int64), np.empty_like(values)
    for t in range(tokens):
        token_of[start[t] : start[t + 1]] = t
    end, layer, token = n_features, 0, 0
    for i in range(number):
        end, layer, token = _walk(ids[i], end, layer, token, tokens, n_features)
        n = start[token]
        start[token] += 1
        feature_of[n], value_of[n] = ids[i] - end + (layer + 1) * n_features, values[i]
    return token_of, feature_of, value_of


@compiled()
def of_tokens(ids, values, keep, count):
    """Token, feature and value of what is kept of each token's pool."""
    number = 0
    for token in range(len(count)):
        for i in range(count[token]):
            number += keep[token, i]
    token_of, feature_of, value_of = (
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.empty(number, values.dtype),
    )
    n = 0
    for token in range(len(count)):
        for i in range(count[token]):
            if keep[token, i]:
                token_of[n], feature_of[n], value_of[n] = token, ids[token, i], values[token, i]
                n += 1
    return token_of, feature_of, value_of
