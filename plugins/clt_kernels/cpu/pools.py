"""The loops of the selection: keys of numbers, pools of candidates, and results in order.

Numbers are compared as integers, their keys, which have the order of the numbers: no branch is needed for NaN or signs.
A pool keeps candidates in the order in which they came, and a bound that a new one must beat. Most numbers do not. When
a pool has 2 k candidates it is cut back to the k best, and the k-th best becomes the bound. Of equal keys the earlier
one is kept: a later one that only equals the bound loses.

Shapes: B tokens, L layers, F features per layer, k kept per pool, C candidates, P pools, N results.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from clt_kernels.cpu.bits import compiled, widen

STRETCH, SHORT_STRETCH = 1024, 256
"""Numbers that are looked at together: they stay in the first cache. A pool holds as many more than 2 k, and is cut
between stretches; so a pool of a token, in which k is small, has short ones."""


@compiled(fastmath=False)  # each operation is rounded, as torch does it: the same numbers are kept
def _scores(pre, low, high, scale, shift, out):
    """pre * scale + shift of pre[low:high]; a scale or shift of no entries is none."""
    n_features = max(len(scale), len(shift))
    if n_features == 0:
        for i in range(high - low):
            out[i] = widen(pre[low + i])
        return
    place = low
    while place < high:
        # Up to the end of a token's features.
        f = place % n_features
        end = min(high, place + n_features - f)
        part, made = pre[place:end], out[place - low : end - low]
        if len(shift) == 0:
            for i in range(len(part)):
                made[i] = widen(part[i]) * scale[f + i]
        elif len(scale) == 0:
            for i in range(len(part)):
                made[i] = widen(part[i]) + shift[f + i]
        else:
            for i in range(len(part)):
                made[i] = widen(part[i]) * scale[f + i] + shift[f + i]
        place = end


@compiled()
def _make_keys(bits, count):
    """The numbers of which these are the bits, as integers of the same order. NaN counts as +inf, -0 as 0."""
    zero = bits.dtype.type(0)
    sign = bits.dtype.type(8 * bits.itemsize - 1)
    magnitude = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    infinity = bits.dtype.type(0x7F800000 if bits.itemsize == 4 else 0x7FF0000000000000)
    for i in range(count):
        b = bits[i]
        size = b & magnitude
        b = infinity if size > infinity else b
        b = zero if size == zero else b
        bits[i] = b ^ ((b >> sign) & magnitude)


@compiled()
def _kth(keys, count, k, counts, same):
    """The k-th largest of keys[:count], and how many of those equal to it are among the k.

    The range of the keys is cut into equal parts, and the keys in each are counted; then the same for those in the part
    that the k-th is in.

    Args:
        counts: int32, at least 64, overwritten; same: as large as `keys`, overwritten.
    """
    source, number, left = keys, count, k
    while True:
        low = high = source[0]
        for i in range(number):
            low = min(low, source[i])
            high = max(high, source[i])
        # Halves: the difference of two keys may need a bit more than they have.
        base = np.int64(low) >> 1
        span = (np.int64(high) >> 1) - base
        if span == 0:
            highest = 0
            for i in range(number):
                highest += source[i] == high
            return (high, left) if highest >= left else (low, left - highest)
        # About as many parts as keys: fewer would leave more keys in a part, more would take longer to go through.
        parts = 64
        while parts < number and parts < len(counts):
            parts *= 2
        shift = 0
        while span >> shift >= parts:
            shift += 1
        value = span >> shift
        counts[: value + 1] = 0
        for i in range(number):
            counts[((np.int64(source[i]) >> 1) - base) >> shift] += 1
        while counts[value] < left:
            left -= counts[value]
            value -= 1
        inside = 0
        for i in range(number):
            # Written whether it is inside or not, and overwritten if not: a branch would be mispredicted.
            key = source[i]
            same[inside] = key
            inside += ((np.int64(key) >> 1) - base) >> shift == value
        source, number = same, inside


@compiled()
def cut(keys, ids, values, count, k, counts, same):
    """Keep the k best of `count` candidates, in their order; returns the key of the k-th best."""
    kth, left = _kth(keys, count, k, counts, same)
    kept = 0
    for i in range(count):
        key = keys[i]
        equal = (key == kth) & (left > 0)
        left -= equal
        keys[kept], ids[kept], values[kept] = key, ids[i], values[i]
        kept += (key > kth) | equal
    return kth


@compiled()
def _see(pre, score, begin, end, first, scale, shift, k, keys, ids, values, count, bound, numbers, at, counts, same):
    """Add what beats the bound among score[begin:end] to a pool; returns its number of candidates and its bound."""
    made = numbers.view(keys.dtype)
    for low in range(begin, end, len(numbers)):
        high = min(low + len(numbers), end)
        _scores(score, low, high, scale, shift, numbers)
        _make_keys(made, high - low)
        passed = 0
        for i in range(high - low):
            at[passed] = i
            passed += made[i] > bound
        for n in range(passed):
            i = at[n]
            keys[count], ids[count], values[count] = made[i], first + low + i, widen(pre[low + i])
            count += 1
        if count >= 2 * k:
            bound = cut(keys, ids, values, count, k, counts, same)
            count = k
    return count, bound


@compiled(parallel=True)
def see_batch(pre, score, tokens, first, scale, shift, k, keys, ids, values, count, bound):
    """Show a block, B · F numbers, to pools that have an equal part of the tokens each."""
    pools = len(count)
    n_features = len(pre) // tokens
    for pool in prange(pools):
        numbers, at = np.empty(STRETCH, values.dtype), np.empty(STRETCH + 1, np.int32)
        counts, same = np.empty(4096, np.int32), np.empty(keys.shape[1], keys.dtype)
        begin, end = tokens * pool // pools * n_features, tokens * (pool + 1) // pools * n_features
        count[pool], bound[pool] = _see(
            pre, score, begin, end, first, scale, shift, k, keys[pool], ids[pool], values[pool], count[pool],
            bound[pool], numbers, at, counts, same,
        )  # fmt: skip


@compiled(parallel=True)
def see_tokens(pre, score, tokens, first, scale, shift, k, keys, ids, values, count, bound, threads):
    """Show a block, B · F numbers, to a pool for each token."""
    n_features = len(pre) // tokens
    for thread in prange(threads):
        numbers, at = np.empty(SHORT_STRETCH, values.dtype), np.empty(SHORT_STRETCH + 1, np.int32)
        counts, same = np.empty(512, np.int32), np.empty(keys.shape[1], keys.dtype)
        for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            begin, end = token * n_features, (token + 1) * n_features
            count[token], bound[token] = _see(
                pre, score, begin, end, first - begin, scale, shift, k, keys[token], ids[token], values[token],
                count[token], bound[token], numbers, at, counts, same,
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
    all_keys, all_ids, all_values = (
        np.empty(total, keys.dtype),
        np.empty(total, ids.dtype),
        np.empty(total, values.dtype),
    )
    place = 0
    for pool in range(len(count)):
        end = place + count[pool]
        all_keys[place:end] = keys[pool, : count[pool]]
        all_ids[place:end] = ids[pool, : count[pool]]
        all_values[place:end] = values[pool, : count[pool]]
        place = end
    if total <= k:
        return all_keys, all_ids, all_values
    kth, left = _kth(all_keys, total, k, np.empty(4096, np.int32), np.empty(total, keys.dtype))
    # Of those that equal the k-th best, the lowest ids: they may lie in any pool.
    equal = np.sort(all_ids[all_keys == kth])
    last = equal[left - 1]
    kept = 0
    for i in range(total):
        key, id = all_keys[i], all_ids[i]
        all_keys[kept], all_ids[kept], all_values[kept] = key, id, all_values[i]
        kept += (key > kth) | ((key == kth) & (id <= last))
    return all_keys[:kept], all_ids[:kept], all_values[:kept]


@compiled()
def by_token(ids, values, tokens, n_features):
    """Token, feature (layer * F + f) and value of ids (layer * B + token) * F + f, by token: a counting sort.

    The ids of a token must ascend.
    """
    number = len(ids)
    # A product in float64 in place of a division: right for ids below 2^51.
    per_feature, per_token = 1 / n_features, 1 / tokens
    start = np.zeros(tokens + 1, np.int64)
    for i in range(number):
        place = np.int64((ids[i] + 0.5) * per_feature)
        start[place - np.int64((place + 0.5) * per_token) * tokens + 1] += 1
    for token in range(tokens):
        start[token + 1] += start[token]
    token_of, feature_of, value_of = np.empty(number, np.int64), np.empty(number, np.int64), np.empty_like(values)
    for token in range(tokens):
        token_of[start[token] : start[token + 1]] = token
    for i in range(number):
        place = np.int64((ids[i] + 0.5) * per_feature)
        layer = np.int64((place + 0.5) * per_token)
        token = place - layer * tokens
        n = start[token]
        start[token] += 1
        feature_of[n], value_of[n] = ids[i] - (place - layer) * n_features, values[i]
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
