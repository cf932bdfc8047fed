"""Skewed activations, and a run whose normalisation is fitted to them.

Their means are not 0, dimensions of different size go together, one dimension never varies, nor do a layer's targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugins.data.batch import Batch
from clt_plugins.model.assemble import Parts
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.testing.bench import Bench

BATCHES = 6
"""How many the statistics are of."""


def fitted(bench: Bench, *, dtype: str = "float64", inputs: float = 1.0, targets: float = 1.0) -> Parts:
    """A run whose normalisation is fitted, to activations that are so many times as large."""
    parts = bench.parts(transcoder={"dtype": dtype})
    batches = [skewed_batch(bench, number) for number in range(BATCHES)]
    fit_to_batches(parts.transcoder, [Batch(each.inputs * inputs, each.targets * targets) for each in batches])
    return parts


def skewed_batch(bench: Bench, number: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Skewed activations [16, 3, 6], rounded to float32 so that each type has the same."""
    drawn = bench.batch(torch.float64, seed=100 + number)
    sizes = torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    sides: list[Tensor] = []
    for x, mean in ((drawn.inputs, 0.7), (drawn.targets, -1.3)):
        x = x.clone()
        x[..., 1] += 0.8 * x[..., 2]
        x = x * sizes + mean
        x[:, 0, 4] = 0.25  # never varies
        sides.append(x)
    sides[1][:, 2] = 1.5
    return Batch(*(x.float().to(dtype) for x in sides))
