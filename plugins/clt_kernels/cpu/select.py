"""The k best of many numbers on a CPU: each number is looked at once, and sorted never.

The loops are in `pools` and `results`. A batch has a pool for each thread, which sees some tokens of every block; the
pools are joined at the end. What is dropped is beaten by k others, so the result does not depend on the number of
threads.

Shapes: B tokens, L layers, F features per layer, R rows (B, or 1 for a batch), C candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clt_kernels.cpu import pools, results
from clt_kernels.cpu.threads import use_threads
from clt_plugins import Kept

if TYPE_CHECKING:
    from clt_plugins import Per, Ranks

PER_THREAD, PER_THREAD_CUT = 2**17, 2**14
"""Numbers worth a thread of their own: to be looked at, and in pools of tokens that are all taken or to be cut."""
SAMPLED_SHARE = 0.6
"""A first block of which more than that is to be kept is not sampled for a bound."""


class NumbaSelect:
    """`Select` on a CPU, for float32, bfloat16 and float64; arguments as of `Kernels.select`.

    Args:
        threads: how many loops may run at a time.
    """

    def __init__(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, threads: int):
        self.tokens, self.n_layers, self.n_features, self.k = tokens, n_layers, n_features, k
        self.per_token = per == "token"
        self.takes_all = self.per_token and n_layers * n_features <= 2 * pools.SHORT_STRETCH
        worth = PER_THREAD_CUT if self.takes_all else PER_THREAD
        self.most, self.threads = threads, max(1, min(threads, tokens * n_features // worth))
        self.keys: Any = None
        self.bound: Any = None
        self.seen_together = 0

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
        given = [x.dtype for x in (pre, scale, shift, score) if x is not None]
        wide = torch.float64 if torch.float64 in given else torch.float32
        numbers = _flat(pre)
        if self.keys is None:
            self._allocate(np.dtype(np.float64 if wide == torch.float64 else np.float32), pre.dtype)
        none = np.empty(0, self.values.dtype)
        factor, summand = (none if x is None else x.detach().to(wide).contiguous().numpy() for x in (scale, shift))
        scores = numbers if score is None else _flat(score)
        use_threads(self.threads)
        width = self.n_features if self.per_token else self.tokens * self.n_features
        block = numbers, scores, self.tokens, layer * width, factor, summand
        pool = self.k, self.keys, self.ids, self.values, self.count, self.bound
        if self.per_token:
            pools.see_tokens(*block, *pool, self.threads)
        else:
            self._see_batch(block, pool)

    def _see_batch(self, block: Any, pool: Any) -> None:
        """Show a block to the pools of a batch, and raise the bound of all where that is worth it."""
        first, scores, lowest = not self.count.any(), block[1], self.bound[0]
        if sampled := first and len(scores) >= 16 * pools.SAMPLE and self.k <= SAMPLED_SHARE * len(scores):
            number = np.empty(1, self.values.dtype)
            self.bound[:] = max(lowest, pools.sampled_bound(scores, *block[-2:], self.k, self.keys, number))
        pools.see_batch(*block, *pool)
        total = self.count.sum()
        if sampled and total < self.k:
            # The sample was not like the block: what was passed over may be among the best.
            self.count[:], self.bound[:] = 0, lowest
            pools.see_batch(*block, *pool)
        elif len(self.count) > 1 and total >= self.k + self.k // 2 and total - self.seen_together > self.k // 3:
            self.bound = np.maximum(self.bound, pools.bound_of_all(self.k, total, self.keys, self.count))
            self.seen_together = total

    def _allocate(self, wide: np.dtype[Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        numbers = self.n_layers * self.n_features * (1 if self.per_token else self.tokens)
        number = self.tokens if self.per_token else self.threads
        # A pool that is cut at twice what it keeps has a high bound early, and stays in the cache. One of few numbers,
        # such as that of AuxK, is cut once at the end.
        stretch, least = (pools.SHORT_STRETCH, 64) if self.per_token else (pools.STRETCH, 0)
        full = numbers + 1 if self.takes_all else max(2 * self.k, least)
        shape = number, min(full, numbers + 1) + stretch
        key_type = np.dtype(f"i{wide.itemsize}")
        self.keys, self.values = np.empty(shape, key_type), np.empty(shape, wide)
        self.ids = np.empty(shape, np.int32 if numbers < 2**31 else np.int64)
        self.count = np.zeros(number, np.int64)
        # The key of -inf, which is never kept.
        lowest = np.array(-np.inf, wide).view(key_type)
        self.bound = np.full(number, lowest ^ np.iinfo(key_type).max, key_type)

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """See `Select.finish`."""
        made = self._of_tokens(ranks) if self.per_token else self._of_batch(ranks)
        token, feature, pre = (torch.from_numpy(x) for x in made)
        return Kept(token, feature, pre.to(self.dtype))

    def _of_tokens(self, ranks: Ranks | None) -> tuple[Any, ...]:
        threads = use_threads(min(self.most, self.keys.size // PER_THREAD_CUT))
        results.cut_tokens(self.k, self.keys, self.ids, self.values, self.count, threads)
        width = int(self.count.max(initial=0))
        keys, ids, values = (x[:, :width] for x in (self.keys, self.ids, self.values))
        keep = np.arange(width) < self.count[:, None]
        if ranks is not None:
            keep = self._among(ranks, keys, ids, keep)
        made = self._empty(keep.sum())
        results.of_tokens(ids, values, keep, self.count, *made)
        return made

    def _of_batch(self, ranks: Ranks | None) -> tuple[Any, ...]:
        use_threads(self.threads)
        if (total := self.count.sum()) > self.k:
            bound, left, equal = results.kth_of_all(self.k, total, self.keys, self.ids, self.count)
            # Of those that equal the k-th best, the lowest ids.
            last = np.partition(equal, left - 1)[left - 1]
            results.cut_pools(bound, last, self.keys, self.ids, self.values, self.count)
        if ranks is not None:
            inside = np.arange(self.keys.shape[1]) < self.count[:, None]
            keys, ids = self.keys[inside][None], self.ids[inside][None]
            keep = self._among(ranks, keys, ids, np.ones(keys.shape, np.bool_))[0]
            for number, kept in enumerate(np.split(keep, np.cumsum(self.count)[:-1])):
                self.count[number] = kept.sum()
                for x in (self.ids[number], self.values[number]):
                    x[: self.count[number]] = x[: len(kept)][kept]
        made, start = self._empty(self.count.sum()), np.cumsum(self.count) - self.count
        results.by_token(self.ids, self.values, self.count, self.tokens, self.n_features, start, *made)
        return made

    def _empty(self, number: int) -> tuple[Any, ...]:
        return np.empty(number, np.int64), np.empty(number, np.int64), np.empty(number, self.values.dtype)

    def _among(self, ranks: Ranks, keys: Any, ids: Any, inside: Any) -> Any:
        """Which are among the k best of all ranks."""
        scores = (keys ^ ((keys >> (8 * keys.itemsize - 1)) & np.iinfo(keys.dtype).max)).view(self.values.dtype)
        score = torch.from_numpy(np.where(inside, scores, -np.inf))
        return ranks.among(score, torch.from_numpy(np.where(inside, ids, 0)).long(), self.k).numpy()


def _flat(x: Tensor) -> Any:
    """The numbers of a block [B, F] in one row; of bfloat16 their bits."""
    flat = x.detach().reshape(-1)
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()
