"""The normalisation `robust`: (x - median) / (1.4826 · MAD), MAD = median |x - median| (Rousseeuw & Croux 1993).

1.4826 makes the scale of normal numbers their standard deviation. L layers, D d_model, K tokens of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clt_plugins import AffineNormalisation, Batch, Context, generator

LAST = torch.iinfo(torch.int64).max


class Robust(AffineNormalisation):
    """The sample are the K tokens with the smallest hash of their numbers: the same however tokens are split."""

    needs = ()

    def __init__(self, sample: int, context: Context):
        super().__init__(context)
        self.size, self.context = sample, context
        self.shape = (2, context.n_layers, context.d_model)
        self.rows, self.keys = torch.zeros(0, *self.shape), torch.zeros(0, dtype=torch.int64)

    def observe(self, batch: Batch) -> None:
        rows = torch.stack((batch.inputs.float(), batch.targets.float()), 1)
        draw = generator(self.context.seed, "robust")
        odd = torch.randint(-(2**62), 2**62, self.shape, generator=draw) * 2 + 1
        # Products and sums of integers wrap, so that their order does not matter.
        key = (rows.view(torch.int32).long() * odd).sum((1, 2, 3))
        key = (key ^ (key >> 29)) * -4658895280553007687
        self._keep(torch.cat((self.rows, rows)), torch.cat((self.keys, key ^ (key >> 32))))

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        self.keys, order = keys.sort(stable=True)
        self.keys, self.rows = self.keys[: self.size], rows[order[: self.size]]

    def observed_bytes(self) -> int:
        """Nothing: the sample is on the CPU."""
        return 0

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        parallel, n = self.context.parallel, len(self.keys)
        # Each data rank fills a place of its own, so that the sum is everybody's sample.
        keys = torch.zeros(parallel.data_ranks, self.size, dtype=torch.int64)
        rows = torch.zeros(parallel.data_ranks, self.size, *self.shape)
        keys[parallel.data_rank] = LAST
        keys[parallel.data_rank, :n], rows[parallel.data_rank, :n] = self.keys, self.rows
        keys, rows = (parallel.total(x, over="tokens").flatten(0, 1) for x in (keys, rows))
        self._keep(rows[keys < LAST], keys[keys < LAST])
        sample = self.rows.double()
        median = sample.quantile(0.5, 0)
        away = (sample - median).abs()
        scale, spread = 1.4826 * away.quantile(0.5, 0), 1.2533 * away.mean(0)
        # Where most numbers are equal, the mean deviation serves; where all are, nothing is divided.
        scale = torch.where(scale > 1e-6 * spread, scale, torch.where(spread > 1e-6, spread, 1.0))
        for number, side in enumerate(("input", "target")):
            self.get_buffer(f"{side}_shift").copy_(median[number])
            self.get_buffer(f"{side}_scale").copy_(scale[number])
        self.rows, self.keys = self.rows[:0], self.keys[:0]
