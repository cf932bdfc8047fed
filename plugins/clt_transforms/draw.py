"""Transforms that draw random numbers: the same for a row whatever the number of data ranks, if none was dropped
before.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import Batch, generator

if TYPE_CHECKING:
    from clt_plugins import Context
    from clt_transforms import NoiseConfig, SubsampleConfig


class Subsample:
    """A `Transform`: keeps each row with a probability."""

    held_out = False
    drops = True

    def __init__(self, config: SubsampleConfig, context: Context):
        self.share, self.seed, self.parallel = config.share, context.seed, context.parallel

    def __call__(self, batch: Batch, number: int) -> Batch:
        rank, ranks, rows = self.parallel.data_rank, self.parallel.data_ranks, batch.tokens
        # Data ranks have slices of one batch: each takes its slice of the draws for all of it.
        draws = torch.rand(ranks * rows, generator=generator(self.seed, "subsample", number))
        return batch.rows((draws[rank * rows : (rank + 1) * rows] < self.share).nonzero().flatten())


class Noise:
    """A `Transform`: adds normal noise, relative to the root mean square of each activation over its dimensions."""

    held_out = False
    drops = False

    def __init__(self, config: NoiseConfig, context: Context):
        self.sizes = {"inputs": config.inputs, "targets": config.targets}
        self.seed, self.parallel = context.seed, context.parallel

    def __call__(self, batch: Batch, number: int) -> Batch:
        inputs, targets = (
            self._noisy(getattr(batch, side), size, side, number) if size else getattr(batch, side)
            for side, size in self.sizes.items()
        )
        return Batch(inputs, targets, batch.token_ids, batch.positions)

    def _noisy(self, x: Tensor, size: float, side: str, number: int) -> Tensor:
        rank, ranks, (rows, *others) = self.parallel.data_rank, self.parallel.data_ranks, x.shape
        random = generator(self.seed, "noise", side, number, device=x.device)
        # Drawn for the whole batch: the numbers of a part of it would be others.
        draws = torch.randn(ranks * rows, *others, generator=random, device=x.device, dtype=torch.float32)
        rms = x.float().square().mean(-1, keepdim=True).sqrt()
        return x + (size * rms * draws[rank * rows : (rank + 1) * rows]).to(x.dtype)
