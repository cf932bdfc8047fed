"""The k best of many numbers on a CPU: each number is looked at once, and sorted never.

The loops are in `pools`. A batch has a pool for each thread, which sees some tokens of every block; the pools are
joined at the end. What a pool drops is beaten by k others, so the result does not depend on the number of threads.

Shapes: B tokens, L layers, F features per layer, R rows (B, or 1 for a batch), C candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clt_kernels.cpu import pools
from clt_kernels.cpu.threads import use_threads
from clt_plugins import Kept

if TYPE_CHECKING:
    from clt_plugins import Per, Ranks

PER_THREAD = 2**17
"""Numbers worth a thread of their own."""


class NumbaSelect:
    """`Select` on a CPU, for float32, bfloat16 and float64; arguments as of `Kernels.select`.

    Args:
        threads: how many loops may run at a time.
    """

    def __init__(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, threads: int):
        self.tokens, self.n_layers, self.n_features, self.k = tokens, n_layers, n_features, k
        self.per_token = per == "token"
        self.threads = max(1, min(threads, tokens * n_features // PER_THREAD))
        self.keys: Any = None

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
            pools.see_batch(*block, *pool)

    def _allocate(self, wide: np.dtype[Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        numbers = self.n_layers * self.n_features * (1 if self.per_token else self.tokens)
        number = self.tokens if self.per_token else self.threads
        # A pool that is cut at twice what it keeps has a high bound early, and stays in the cache. One of few numbers,
        # such as that of AuxK, is cut once at the end.
        stretch, least = (pools.SHORT_STRETCH, 64) if self.per_token else (pools.STRETCH, 0)
        full = numbers + 1 if self.per_token and numbers <= 2 * pools.SHORT_STRETCH else max(2 * self.k, least)
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
        if self.per_token:
            pools.cut_tokens(self.k, self.keys, self.ids, self.values, self.count)
            width = int(self.count.max(initial=0))
            keys, ids, values = (x[:, :width] for x in (self.keys, self.ids, self.values))
            keep = np.arange(width) < self.count[:, None]
            if ranks is not None:
                keep = self._among(ranks, keys, ids, keep)
            made = pools.of_tokens(ids, values, keep, self.count)
        else:
            keys, ids, values = pools.join(self.k, self.keys, self.ids, self.values, self.count)
            if ranks is not None:
                keep = self._among(ranks, keys[None], ids[None], np.ones((1, len(ids)), np.bool_))[0]
                ids, values = ids[keep], values[keep]
            made = pools.by_token(ids, values, self.tokens, self.n_features)
        token, feature, pre = (torch.from_numpy(x) for x in made)
        return Kept(token, feature, pre.to(self.dtype))

    def _among(self, ranks: Ranks, keys: Any, ids: Any, inside: Any) -> Any:
        """Which are among the k best of all ranks."""
        scores = (keys ^ ((keys >> (8 * keys.itemsize - 1)) & np.iinfo(keys.dtype).max)).view(self.values.dtype)
        score = torch.from_numpy(np.where(inside, scores, -np.inf))
        return ranks.among(score, torch.from_numpy(np.where(inside, ids, 0)).long(), self.k).numpy()


def _flat(x: Tensor) -> Any:
    """The numbers of a block [B, F] in one row; of bfloat16 their bits."""
    flat = x.detach().reshape(-1)
    return flat.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else flat.numpy()
