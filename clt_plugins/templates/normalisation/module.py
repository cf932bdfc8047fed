"""What `build` returns: a `Normalisation` that `Observes`. Shapes: B tokens, L layers, D d_model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clt_plugins import AffineNormalisation, Batch, Context


class Example(AffineNormalisation):
    """x · size / mean |x| of the layer. The base class has the buffers, `inputs`, `targets`, `restore` and `fold`."""

    # Of the engine's own statistics (mean, std, rms, norm) it needs none: it gathers its own in `observe`.
    needs = ()

    def __init__(self, size: float, context: Context):
        super().__init__(context)
        self.size, self.parallel = size, context.parallel
        # No buffers: they are needed until `fit`, and not saved.
        self.sums = torch.zeros(2, context.n_layers, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def observe(self, batch: Batch) -> None:
        """Called for the first batches, on the CPU, with this data rank's tokens."""
        for total, raw in zip(self.sums, (batch.inputs, batch.targets), strict=True):
            total += raw.double().abs().sum((0, 2))
        self.count += batch.inputs.shape[0] * batch.inputs.shape[2]

    def observed_bytes(self) -> int:
        """What `observe` keeps on the transcoder's device: nothing, it is on the CPU."""
        return 0

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the buffers; the sums become those of all data ranks."""
        sums = self.parallel.total(self.sums, over="tokens")
        means = sums / self.parallel.total(self.count, over="tokens")
        for side, mean in zip(("input", "target"), means, strict=True):
            # A layer that writes nothing has a mean of 0, which nothing can be divided by.
            scale = (mean / self.size).clamp_min(1e-6)
            buffer = self.get_buffer(f"{side}_scale")
            buffer.copy_(scale[:, None].expand_as(buffer))
        self.sums, self.count = torch.zeros_like(self.sums), torch.zeros_like(self.count)
