"""The best of a batch as pairs in the order of tokens: device code, compiled by Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from clt_kernels.gpu.select.batch import CHUNK, KEPT, new_places, settle
from clt_kernels.gpu.select.keys import unsigned


@triton.jit(do_not_specialize=["k", "end", "digits", "last_of_id", "last_low"])
def emit(
    kept_keys, kept_ids, kept_values, kept, rank_ids, state, counts, out, out_values,
    k, end, digits, last_of_id, last_low, tokens, n_layers, n_features,
):  # fmt: skip
    """Copy the best to the result, as (token * L + layer) * F + f, by which it is then sorted.

    Args:
        rank_ids: the ids that are compared, of all ranks; `end` is the last.
    """
    key_so_far, back_so_far, left, done = settle(state, counts, digits, k, 0, last_of_id, last_low)
    stop = tl.load(kept)
    for start in range(tl.program_id(0) * CHUNK, stop, tl.num_programs(0) * CHUNK):
        n = start + tl.arange(0, CHUNK)
        inside = n < stop
        key, id = tl.load(kept_keys + n, mask=inside, other=0), tl.load(rank_ids + n, mask=inside, other=0)
        least = unsigned(key_so_far.to(key.dtype))
        stays = inside & ((key > least) | ((key == least) & (end - id >= back_so_far)))
        place = new_places(stays, counts)
        own = tl.load(kept_ids + n, mask=stays, other=0)
        row, f = own // n_features, own % n_features
        pair = ((row % tokens) * n_layers + row // tokens) * n_features + f
        tl.store(out + place, pair.to(out.dtype.element_ty), mask=stays)
        tl.store(out_values + place, tl.load(kept_values + n, mask=stays, other=0), mask=stays)


@triton.jit
def split(
    pairs, order, values, counts, token, feature, pre, count, size, tokens, columns,
):  # fmt: skip
    """The sorted pairs as token and feature, with their pre-activations. Behind them: last token, last feature, -inf.

    Args:
        columns: L * F.
    """
    number = tl.load(counts + KEPT)
    if tl.program_id(0) == 0:
        tl.store(count, number.to(tl.int64))
    n = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    kept = n < number
    pair = tl.load(pairs + n, mask=kept, other=0).to(tl.int64)
    tl.store(token + n, tl.where(kept, pair // columns, tokens - 1), mask=n < size)
    tl.store(feature + n, tl.where(kept, pair % columns, columns - 1), mask=n < size)
    value = tl.load(values + tl.load(order + n, mask=kept, other=0), mask=kept, other=float("-inf"))
    tl.store(pre + n, value.to(pre.dtype.element_ty), mask=n < size)
