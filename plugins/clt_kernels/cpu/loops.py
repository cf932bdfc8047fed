"""The compiled loops of the CPU kernels.

All three go through the targets one after the other, and through each target by slices of columns. A slice of a dense
[B, L, D] fits a cache. So each weight row is read from memory once for all tokens that use it (features in order, the
next rows prefetched), and the rows of the tokens come from the cache.

Threads take units of work from a counter. Each number of a result belongs to one unit, or to several units one after
the other, and is summed in a fixed order: results do not depend on the number of threads.

A plan (see `kernels.Plan`) lists for each target the blocks of rows that write to it. A block is the rows
`base + f * step` of the weight, used by feature f of each of its source layers.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows, C columns of a slice.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from clt_kernels.cpu.bits import LINE, fetch_add, narrow, prefetch, readable, widen
from clt_kernels.cpu.compiled import compiled

CHUNK = 256
"""Features in a unit of work."""


@compiled()
def group_by_feature(token, feature, features):
    """Sort pairs by feature, tokens ascending: their order [N], their tokens [N], where each feature begins."""
    start = np.zeros(features + 1, np.int64)
    for n in range(len(feature)):
        start[feature[n] + 1] += 1
    for f in range(features):
        start[f + 1] += start[f]
    free = start[:-1].copy()  # where the next pair of each feature goes
    order, tokens = np.empty(len(feature), np.int32), np.empty(len(feature), np.int32)
    for n in range(len(feature)):
        i = free[feature[n]]
        free[feature[n]] += 1
        order[i] = n
        tokens[i] = token[n]
    return order, tokens, start


@compiled()
def _next_used(f, stop, sources, start, F):
    """The first feature from f on that is used by any of the source layers, or `stop`."""
    while f < stop:
        for s in sources:
            if start[s * F + f] < start[s * F + f + 1]:
                return f
        f += 1
    return stop


@compiled()
def _prefetch_row(flat, low, high):
    for index in range(low, high, LINE // flat.itemsize):
        prefetch(flat, index)


@compiled()
def _gather_sum(out, source, index, value, column, low, high):
    """out += the sum of value[i, column] * source[index[i]] over low <= i < high.

    Four terms at a time, so that `out` is read and written less often.
    """
    width = len(out)
    i = low
    while i + 4 <= high:
        a, b, c, d = source[index[i]], source[index[i + 1]], source[index[i + 2]], source[index[i + 3]]
        p, q, r, s = value[i, column], value[i + 1, column], value[i + 2, column], value[i + 3, column]
        for x in range(width):
            out[x] += (p * a[x] + q * b[x]) + (r * c[x] + s * d[x])
        i += 4
    while i < high:
        a, p = source[index[i]], value[i, column]
        for x in range(width):
            out[x] += p * a[x]
        i += 1


@compiled()
def _add_dots(out, column, row, source, index, low, high):
    """out[i, column] += row · source[index[i]] for low <= i < high.

    Four products at a time, so that `row` is read less often.
    """
    width = len(row)
    i = low
    while i + 4 <= high:
        a, b, c, d = source[index[i]], source[index[i + 1]], source[index[i + 2]], source[index[i + 3]]
        p = q = r = s = source.dtype.type(0)
        for x in range(width):
            p += row[x] * a[x]
            q += row[x] * b[x]
            r += row[x] * c[x]
            s += row[x] * d[x]
        out[i, column] += p
        out[i + 1, column] += q
        out[i + 2, column] += r
        out[i + 3, column] += s
        i += 4
    while i < high:
        a, p = source[index[i]], source.dtype.type(0)
        for x in range(width):
            p += row[x] * a[x]
        out[i, column] += p
        i += 1


@compiled(parallel=True)
def decode(values, per_target, tokens, start, F, plan, weight, out, width, threads):
    """values [N, 1 or L] in feature order. A unit is a slice of one target: its sums stay in one thread's tile."""
    B, L, D = out.shape
    block_start, blocks, source_start, sources = plan
    flat = weight.reshape(weight.size)
    slices = (D + width - 1) // width
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        tile = np.empty((B, width), out.dtype)
        buffer = np.empty(width, out.dtype)
        while True:
            unit = fetch_add(counter)
            if unit >= L * slices:
                break
            t = L - 1 - unit // slices  # the last target has the most to do
            low = unit % slices * width
            high = min(D, low + width)
            column = t if per_target else 0
            tile[:] = 0
            for k in range(block_start[t], block_start[t + 1]):
                base, step = blocks[k, 0], blocks[k, 1]
                users = sources[source_start[k] : source_start[k + 1]]
                f = _next_used(0, F, users, start, F)
                after = _next_used(f + 1, F, users, start, F)
                while f < F:
                    then = _next_used(after + 1, F, users, start, F)
                    if then < F:
                        _prefetch_row(flat, (base + then * step) * D + low, (base + then * step) * D + high)
                    row = readable(weight[base + f * step, low:high], buffer)
                    for s in users:
                        for i in range(start[s * F + f], start[s * F + f + 1]):
                            sums, v = tile[tokens[i]], values[i, column]
                            for x in range(high - low):
                                sums[x] += v * row[x]
                    f, after = after, then
            for b in range(B):
                for x in range(high - low):
                    out[b, t, low + x] = tile[b, x]


@compiled(parallel=True)
def grad_values(grad, per_target, tokens, start, F, plan, weight, out, width, threads):
    """out [N, 1 or L], in feature order, zero before. A unit is a chunk of a block; targets follow one another."""
    B, L, D = grad.shape
    block_start, blocks, source_start, sources = plan
    flat = weight.reshape(weight.size)
    chunks = (F + CHUNK - 1) // CHUNK
    slices = (D + width - 1) // width
    tile = np.empty((B, width), grad.dtype)
    for phase in range(L * slices):
        t = phase // slices
        low = phase % slices * width
        high = min(D, low + width)
        column = t if per_target else 0
        for b in prange(B):
            for x in range(high - low):
                tile[b, x] = grad[b, t, low + x]
        counter = np.zeros(1, np.int64)
        for _ in prange(threads):
            buffer = np.empty(width, grad.dtype)
            while True:
                unit = fetch_add(counter)
                if unit >= (block_start[t + 1] - block_start[t]) * chunks:
                    break
                k = block_start[t] + unit // chunks
                base, step = blocks[k, 0], blocks[k, 1]
                users = sources[source_start[k] : source_start[k + 1]]
                stop = min(F, (unit % chunks + 1) * CHUNK)
                f = _next_used(unit % chunks * CHUNK, stop, users, start, F)
                after = _next_used(f + 1, stop, users, start, F)
                while f < stop:
                    then = _next_used(after + 1, stop, users, start, F)
                    if then < stop:
                        _prefetch_row(flat, (base + then * step) * D + low, (base + then * step) * D + high)
                    row = readable(weight[base + f * step, low:high], buffer)
                    for s in users:
                        _add_dots(out, column, row, tile, tokens, start[s * F + f], start[s * F + f + 1])
                    f, after = after, then


@compiled(parallel=True)
def grad_rows(values, per_target, tokens, start, F, plan, overwrite, dense, out, width, threads):
    """values [N, 1 or L] in feature order. A unit is a chunk of a block: each of its rows is summed, then written."""
    B, L, D = dense.shape
    block_start, blocks, source_start, sources = plan
    chunks = (F + CHUNK - 1) // CHUNK
    slices = (D + width - 1) // width
    tile = np.empty((B, width), dense.dtype)
    for phase in range(L * slices):
        t = phase // slices
        low = phase % slices * width
        high = min(D, low + width)
        column = t if per_target else 0
        for b in prange(B):
            for x in range(high - low):
                tile[b, x] = dense[b, t, low + x]
        counter = np.zeros(1, np.int64)
        for _ in prange(threads):
            sums = np.empty(width, dense.dtype)
            while True:
                unit = fetch_add(counter)
                if unit >= (block_start[t + 1] - block_start[t]) * chunks:
                    break
                k = block_start[t] + unit // chunks
                base, step, first = blocks[k, 0], blocks[k, 1], blocks[k, 2]
                for f in range(unit % chunks * CHUNK, min(F, (unit % chunks + 1) * CHUNK)):
                    row = out[base + f * step, low:high]
                    if overwrite and first:
                        for x in range(high - low):
                            sums[x] = 0
                    elif _next_used(f, f + 1, sources[source_start[k] : source_start[k + 1]], start, F) > f:
                        continue  # nothing to add: most rows, where the pairs are those of few features
                    else:
                        for x in range(high - low):
                            sums[x] = widen(row[x])
                    for m in range(source_start[k], source_start[k + 1]):
                        number = sources[m] * F + f
                        _gather_sum(sums[: high - low], tile, tokens, values, column, start[number], start[number + 1])
                    for x in range(high - low):
                        row[x] = narrow(sums[x], row[x])
