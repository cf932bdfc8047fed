"""The loops of the selection that end it: the exact cut, and what is kept in order.

Shapes: B tokens, F features per layer, k kept per pool or batch, C candidates, P pools, N results.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from clt_kernels.cpu.compiled import compiled
from clt_kernels.cpu.cut import PARTS, cut, kth


@compiled(parallel=True)
def cut_tokens(k, keys, ids, values, count, threads):
    """Cut each token's pool to its k best."""
    tokens = len(count)
    for thread in prange(threads):
        counts, same = np.empty(512, np.int32), np.empty(keys.shape[1], keys.dtype)
        for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            if count[token] > k:
                cut(keys[token], ids[token], values[token], count[token], k, counts, same)
                count[token] = k


@compiled()
def kth_of_all(k, total, keys, ids, count):
    """The k-th best key of all pools, of `total` candidates, which are more than k.

    Returns:
        The key; how many that equal it are among the k best; and the ids of all that equal it, from any pool.
    """
    every, filled = np.empty(total, keys.dtype), 0
    for pool in range(len(count)):
        for i in range(count[pool]):
            every[filled] = keys[pool, i]
            filled += 1
    bound, left = kth(every, total, k, np.empty(PARTS, np.int32), np.empty(total, keys.dtype))
    equal, filled = np.empty(total, ids.dtype), 0
    for pool in range(len(count)):
        for i in range(count[pool]):
            equal[filled] = ids[pool, i]
            filled += keys[pool, i] == bound
    return bound, left, equal[:filled]


@compiled(parallel=True)
def cut_pools(bound, last, keys, ids, values, count):
    """Cut each pool of a batch to what is above `bound`, or equal to it and not behind the id `last`."""
    for pool in prange(len(count)):
        kept = 0
        for i in range(count[pool]):
            key, id = keys[pool, i], ids[pool, i]
            keys[pool, kept], ids[pool, kept], values[pool, kept] = key, id, values[pool, i]
            kept += (key > bound) | ((key == bound) & (id <= last))
        count[pool] = kept


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


@compiled(parallel=True)
def by_token(ids, values, count, tokens, n_features, start, token_of, feature_of, value_of):
    """Token, feature (layer * F + f) and value of ids (layer * B + token) * F + f, by token: a counting sort.

    Pool p has the tokens [p B / P, (p + 1) B / P), and its results begin at start[p]. The ids of a token ascend.
    """
    pools = len(count)
    for pool in prange(pools):
        first, after = tokens * pool // pools, tokens * (pool + 1) // pools
        # Where the next one of each token goes; while they are counted, of the token after it.
        place = np.zeros(after - first + 1, np.int64)
        place[0] = start[pool]
        end, layer, token = n_features, np.int64(0), np.int64(0)
        for i in range(count[pool]):
            end, layer, token = _walk(ids[pool, i], end, layer, token, tokens, n_features)
            place[token - first + 1] += 1
        for t in range(first, after):
            place[t - first + 1] += place[t - first]
            token_of[place[t - first] : place[t - first + 1]] = t
        end, layer, token = n_features, np.int64(0), np.int64(0)
        for i in range(count[pool]):
            end, layer, token = _walk(ids[pool, i], end, layer, token, tokens, n_features)
            n = place[token - first]
            place[token - first] += 1
            feature_of[n], value_of[n] = ids[pool, i] - end + (layer + 1) * n_features, values[pool, i]


@compiled()
def of_tokens(ids, values, keep, count, token_of, feature_of, value_of):
    """Token, feature and value of what is kept of each token's pool: `keep` [B, C]."""
    n = 0
    for token in range(len(count)):
        for i in range(count[token]):
            if keep[token, i]:
                token_of[n], feature_of[n], value_of[n] = token, ids[token, i], values[token, i]
                n += 1
