"""The k best of each token, found by counting digits: `Select` by the kernels of `tokens`.

A launch for each layer, and nothing is read back. Tested under Triton's interpreter and compiled ahead of time; not yet
run on a GPU.

Shapes: B tokens, L layers, F features per layer, N places of a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from clt_kernels.gpu.select import tokens
from clt_kernels.gpu.select.blocks import Block, Shape
from clt_kernels.gpu.select.keys import LOWEST
from clt_plugins import Kept

if TYPE_CHECKING:
    from clt_plugins import Ranks

TILE = 2048
"""Numbers of a row that a program looks at together: with more, few programs fit a multiprocessor's registers."""


class TokenSelect:
    """`Select` of each token.

    Memory, besides the result: 20 bytes per number kept (B times k, or `capacity` if it is more).
    """

    def __init__(self, shape: Shape, k: int, capacity: int):
        self.shape = shape
        available = shape.n_layers * shape.n_features
        self.k = k
        self.places = min(max(k, capacity), available)
        self.capacity = max(2 * self.places, 512)
        self.keys: Tensor | None = None

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
        block = Block.of(pre, scale, shift, score)
        if self.keys is None:
            self._allocate(block)
        tile = min(TILE, max(32, triton.next_power_of_2(self.shape.n_features)))
        tokens.see[(self.shape.tokens,)](
            *block, self.keys, self.ids, self.values, self.counts, self.bounds, self.listed,
            self.k, layer * self.shape.n_features, self.shape.n_features, block.numbers.stride(0), block.pre.stride(0),
            self.places, self.capacity, TILE=tile, enable_fp_fusion=False,
        )  # fmt: skip

    def _allocate(self, block: Block) -> None:
        device, self.dtype = block.pre.device, block.pre.dtype
        n_tokens, size = self.shape.tokens, (self.shape.tokens, self.places)
        self.keys = torch.empty(size, dtype=block.key, device=device)
        self.ids = torch.zeros(size, dtype=torch.int32, device=device)
        self.values = torch.empty(size, dtype=torch.promote_types(self.dtype, torch.float32), device=device)
        self.counts = torch.zeros(n_tokens, dtype=torch.int32, device=device)
        self.bounds = torch.full((n_tokens,), LOWEST[torch.iinfo(block.key).bits], dtype=block.key, device=device)
        self.listed = torch.empty(n_tokens, self.capacity, dtype=torch.int32, device=device)

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """See `Select.finish`."""
        assert self.keys is not None, "finish() before see()"
        n_tokens, n_layers, n_features = self.shape
        device, size = self.keys.device, n_tokens * self.places
        mask, number = None, self.counts.long()
        if ranks is not None:
            full = torch.arange(self.places, device=device) < self.counts[:, None]
            score = torch.where(full, _number_of(self.keys), -torch.inf)
            mask = ranks.among(score, self.ids.long(), self.k)
            number = mask.sum(1)
        ends = number.cumsum(0)
        token = torch.full((size,), n_tokens - 1, device=device)
        feature = torch.full((size,), n_layers * n_features - 1, device=device)
        pre = torch.full((size,), -torch.inf, dtype=self.dtype, device=device)
        tokens.pack[(n_tokens,)](
            self.ids, self.values, self.ids if mask is None else mask.view(torch.uint8), self.counts, ends - number,
            token, feature, pre, self.places, MASKED=mask is not None,
        )  # fmt: skip
        return Kept(token, feature, pre, ends[-1])


def _number_of(keys: Tensor) -> Tensor:
    """The numbers that have these keys: see `keys.number_of`."""
    info = torch.iinfo(keys.dtype)
    bits = keys ^ ((keys >> (info.bits - 1)) & info.max)
    return bits.view(torch.float64 if info.bits == 64 else torch.float32)
