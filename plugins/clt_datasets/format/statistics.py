"""The statistics of a data set: computed from its chunks' moments, and stored in `statistics.safetensors`.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clt_datasets.format.chunk import Summary
from clt_plugins import DamagedError, Moments, Refused

SIDES = ("inputs", "targets")


class Totals:
    """The statistics of the chunks to train on, added up chunk by chunk: of a summary nothing is kept."""

    def __init__(self) -> None:
        self.rows = 0
        self._moments: Moments | None = None
        self._errors = np.zeros(())

    def add(self, chunk: Summary) -> None:
        """Add the rows of a chunk."""
        if self._moments is None:
            self._moments = Moments(*chunk.moments.shape[2:])
        self._moments.merge(_moments(chunk))
        self._errors = self._errors + chunk.errors
        self.rows += chunk.rows

    def result(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """What `Source.statistics()` returns, and the stored type's NMSE by side and layer.

        Raises:
            Refused: fewer than two rows.
        """
        if self.rows < 2 or self._moments is None:
            raise Refused("--tokens", f"a data set needs at least 2 tokens to train on, got {self.rows}")
        tensors = self._moments.statistics()
        nmse = {}
        for number, side in enumerate(SIDES):
            deviations = (tensors[f"{side}.std"].square() * (self.rows - 1)).sum(-1).clamp_min(1e-300)
            # JSON has no infinity, which a constant layer in a coarse type could reach.
            nmse[side] = (torch.from_numpy(self._errors[number]) / deviations).clamp_max(1e300).tolist()
        return tensors, nmse


def _moments(chunk: Summary) -> Moments:
    """A chunk's stored moments: about their mean the first sum is 0, and the second is that of squared deviations."""
    moments = Moments(*chunk.moments.shape[2:])
    moments.count = chunk.rows
    for side, (mean, deviations) in zip(SIDES, torch.from_numpy(chunk.moments), strict=True):
        moments.shift[side] = mean
        moments.sums[side][1] = deviations
    return moments


def read_statistics(data: bytes, n_layers: int, d_model: int, name: str) -> dict[str, Tensor]:
    """The tensors of a statistics file: `inputs.mean`, `inputs.std` [L, D], `inputs.rms` [L], the same of targets.

    Args:
        name: the file's, for messages.

    Raises:
        DamagedError: it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise DamagedError(f"{name}: its statistics cannot be read: {error}") from error
    shapes = {"mean": (n_layers, d_model), "std": (n_layers, d_model), "rms": (n_layers,)}
    expected = {f"{side}.{what}": shape for side in SIDES for what, shape in shapes.items()}
    if {key: tuple(value.shape) for key, value in tensors.items()} != expected:
        raise DamagedError(f"{name}: its statistics are of other layers or dimensions than its rows")
    for key, value in tensors.items():
        positive = key.endswith(".mean") or bool((value >= 0).all() and value.any())
        if not (value.is_floating_point() and bool(torch.isfinite(value).all()) and positive):
            raise DamagedError(f"{name}: {key} of its statistics is NaN, infinite, negative, or 0 everywhere")
    return tensors
