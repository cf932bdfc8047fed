"""The k best of many numbers, compiled: each number is looked at once, and sorted never.

A pool keeps candidates in the order of their ids, and a bound that a new one must beat. Most numbers do not. When a
pool has 2 k candidates it is cut back to the k best by counting digits (a radix selection), and the k-th best becomes
the bound. Of equal scores the lower id is kept: a later one that only equals the bound has a higher id, so it loses.

Scores are compared as integers, their keys, which have the order of the numbers: no branch is needed for NaN or signs.

A pool over a batch is split: each thread keeps a pool of its own for its stretch of every block, and the pools are
joined in the order of ids at the end. What a pool drops is beaten by k others, so the result does not depend on the
number of threads.

Shapes: B tokens, F features, k kept per row, R rows, C candidates in a row, T threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from clt_kernels.cpu.bits import compiled
from clt_kernels.cpu.threads import use_threads
from clt_plugins import TorchSelect

if TYPE_CHECKING:
    from clt_plugins import Kept, Per, Ranks

STRETCH, SHORT_STRETCH = 2048, 256
"""Numbers whose keys are made at a time: they stay in the first cache. A pool has room for as many more than 2 k; where
there is a pool for each token, the short one."""
PER_THREAD = 2**17
"""Numbers worth a thread of their own."""


@compiled()
def _make_keys(bits, begin, end, keys):
    """The keys of bits[begin:end]: integers in the order of the numbers. NaN counts as +inf, -0 as 0."""
    zero = bits.dtype.type(0)
    shift = bits.dtype.type(8 * bits.itemsize - 1)
    magnitude = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    infinity = bits.dtype.type(0x7F800000 if bits.itemsize == 4 else 0x7FF0000000000000)
    for i in range(begin, end):
        b = bits[i]
        size = b & magnitude
        b = infinity if size > infinity else b
        b = zero if size == zero else b
        keys[i - begin] = b ^ ((b >> shift) & magnitude)


@compiled()
def _cut(keys, ids, pre, count, k, counts):
    """Keep the k best of `count` candidates, in their order; of equal ones those to the left.

    The first digit of the k-th best is found by counting those of all; the other digits among the few that share it.

    Args:
        counts: [2048] int64, overwritten.

    Returns:
        The key of the k-th best.
    """
    digit = 11 if count > 4096 else 8  # more counts take longer to go through than few keys
    top = 8 * keys.itemsize - digit
    half = 1 << (digit - 1)  # keys have a sign
    counts[: 2 * half] = 0
    for i in range(count):
        counts[(np.int64(keys[i]) >> top) + half] += 1
    left, value = k, 2 * half - 1  # how many of those that have the digit are kept
    while counts[value] < left:
        left -= counts[value]
        value -= 1
    first = np.int64(value - half) << top
    same = np.empty(counts[value], np.int64)  # what follows the digit
    number = 0
    for i in range(count):
        if np.int64(keys[i]) >> top == value - half:
            same[number] = np.int64(keys[i]) - first
            number += 1
    fixed, shift = np.int64(0), top
    while shift > 0:
        width = min(8, shift)
        shift -= width
        counts[: 1 << width] = 0
        for i in range(number):
            counts[(same[i] - fixed) >> shift] += 1
        value = (1 << width) - 1
        while counts[value] < left:
            left -= counts[value]
            value -= 1
        fixed += np.int64(value) << shift
        kept = 0
        for i in range(number):
            same[kept] = same[i]
            kept += (same[i] - fixed) >> shift == 0
        number = kept
    kth = np.empty(1, keys.dtype)
    kth[0] = first + fixed  # in the key's own width
    kept = 0
    for i in range(count):
        key = keys[i]
        equal = key == kth[0] and left > 0
        left -= equal
        keys[kept], ids[kept], pre[kept] = key, ids[i], pre[i]
        kept += key > kth[0] or equal
    return kth[0]


@compiled()
def _see_stretch(bits, pre, begin, end, id, k, keys, ids, values, count, bound, made, at, counts):
    """Add what beats the bound among bits[begin:end] to a pool; returns its number of candidates and its bound."""
    for low in range(begin, end, len(made)):
        high = min(low + len(made), end)
        _make_keys(bits, low, high, made)
        passed = 0
        for i in range(high - low):
            # Written whether it passes or not, and overwritten if not: a branch would be mispredicted.
            at[passed] = i
            passed += made[i] > bound
        for n in range(passed):
            i = at[n]
            keys[count], ids[count], values[count] = made[i], id + low + i, pre[low + i]
            count += 1
        if count >= 2 * k:
            bound = _cut(keys, ids, values, count, k, counts)
            count = k
    return count, bound


@compiled(parallel=True)
def _see_batch(bits, pre, first_id, k, keys, ids, values, count, bound, threads):
    """Show one row, a whole block, to the pools of all threads."""
    size = len(bits)
    for thread in prange(threads):
        made, at = np.empty(STRETCH, bits.dtype), np.empty(STRETCH, np.int32)
        counts = np.empty(2048, np.int64)
        begin, end = size * thread // threads, size * (thread + 1) // threads
        count[thread], bound[thread] = _see_stretch(
            bits, pre, begin, end, first_id, k, keys[thread], ids[thread], values[thread], count[thread], bound[thread],
            made, at, counts,
        )  # fmt: skip


@compiled(parallel=True)
def _see_tokens(bits, pre, first_id, k, keys, ids, values, count, bound, threads):
    """Show each of R rows to its pool."""
    rows, columns = bits.shape
    for thread in prange(threads):
        made, at = np.empty(SHORT_STRETCH, bits.dtype), np.empty(SHORT_STRETCH, np.int32)
        counts = np.empty(2048, np.int64)
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            count[row], bound[row] = _see_stretch(
                bits[row], pre[row], 0, columns, first_id, k, keys[row], ids[row], values[row], count[row], bound[row],
                made, at, counts,
            )  # fmt: skip


@compiled()
def _finish(k, keys, ids, values, count):
    """Cut each pool to its k best."""
    counts = np.empty(2048, np.int64)
    for row in range(len(count)):
        if count[row] > k:
            _cut(keys[row], ids[row], values[row], count[row], k, counts)
            count[row] = k


class NumbaSelect(TorchSelect):
    """`Select` on a CPU, for float32, bfloat16 and float64 scores.

    Args:
        threads: how many loops may run at a time.
    """

    def __init__(self, *shape: int, per: Per, threads: int):
        super().__init__(*shape, per=per)
        self.rows, self.k = self.places.rows, self.places.k
        self.threads = threads
        self.pools = threads if self.rows == 1 else self.rows
        self.firsts: list[int] = []
        """The first id of each block."""
        self.keys: Any = None
        self.bound: Any = None

    def see(
        self,
        layer: int,
        pre: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """See `Select.see`."""
        if score is None:
            score = pre if scale is None else pre * scale
            score = score if shift is None else score + shift
        shape = self.rows, self.places.columns
        score, pre = score.reshape(shape), pre.reshape(shape)
        first_id = layer * self.places.columns
        wide, kept_wide = (torch.promote_types(x.dtype, torch.float32) for x in (score, pre))
        scores, values = score.detach().to(wide).contiguous().numpy(), pre.detach().to(kept_wide).contiguous().numpy()
        bits = scores.view(np.int32 if wide == torch.float32 else np.int64)
        if self.keys is None:
            self._allocate(bits.dtype, values.dtype, pre.dtype)
        self.firsts.append(first_id)
        use_threads(bits.size // PER_THREAD)
        arguments = first_id, self.k, self.keys, self.ids, self.values, self.count, self.bound, self.threads
        if self.rows == 1:
            _see_batch(bits[0], values[0], *arguments)
        else:
            _see_tokens(bits, values, *arguments)

    def _allocate(self, key_type: Any, value_type: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # A pool is cut after each stretch.
        room = self.pools, 2 * self.k + (STRETCH if self.rows == 1 else SHORT_STRETCH)
        self.keys, self.ids, self.values = (np.empty(room, x) for x in (key_type, np.int64, value_type))
        self.count = np.zeros(self.pools, np.int64)
        # The key of -inf, which is never kept.
        lowest = np.array(-np.inf, f"f{np.dtype(key_type).itemsize}").view(key_type)
        self.bound = np.full(self.pools, lowest ^ np.iinfo(key_type).max, key_type)

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """See `Select.finish`."""
        if self.rows == 1:
            self._join()
        _finish(self.k, self.keys, self.ids, self.values, self.count)
        width = int(self.count.max())
        inside = np.arange(width) < self.count[:, None]
        keys = self.keys[:, :width]
        magnitude = np.iinfo(keys.dtype).max
        scores = (keys ^ ((keys >> (8 * keys.itemsize - 1)) & magnitude)).view(f"f{keys.dtype.itemsize}")
        columns = np.where(inside, scores, -np.inf), np.where(inside, self.values[:, :width], 0)
        score, pre = torch.from_numpy(columns[0]), torch.from_numpy(columns[1]).to(self.dtype)
        ids = torch.from_numpy(np.where(inside, self.ids[:, :width], 0))
        keep = score > -torch.inf
        if ranks is not None:
            keep = ranks.among(score, ids, self.places.k)
        return self.places.narrow(ids, pre, keep)

    def _join(self) -> None:
        """Make one pool of those of all threads, in the order of ids: each has a stretch of every block."""
        order = []
        for pool in range(self.pools):
            ids = self.ids[pool, : self.count[pool]]
            order.append(np.searchsorted(ids, [*self.firsts, np.iinfo(np.int64).max]))
        stretches = [
            (pool, slice(order[pool][block], order[pool][block + 1]))
            for block in range(len(self.firsts))
            for pool in range(self.pools)
        ]
        self.keys, self.ids, self.values = (
            np.concatenate([x[pool, part] for pool, part in stretches])[None]
            for x in (self.keys, self.ids, self.values)
        )
        self.count = np.array([self.count.sum()])
