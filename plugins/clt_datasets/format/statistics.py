"""The statistics of a data set: computed from its chunks' moments, and stored in `statistics.safetensors`.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clt_datasets.format.chunk import Summary
from clt_plugins import DamagedError, Moments, Refused

SIDES = ("inputs", "targets")


def statistics(chunks: Sequence[Summary]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Of the chunks to train on: what `Source.statistics()` returns, and the stored type's NMSE by side and layer.

    Raises:
        Refused: fewer than two rows.
    """
    rows = sum(chunk.rows for chunk in chunks)
    if rows < 2:
        raise Refused("--tokens", f"a data set needs at least 2 tokens to train on, got {rows}")
    moments = Moments(*chunks[0].moments.shape[2:])
    for chunk in chunks:
        moments.merge(_moments(chunk))
    tensors = moments.statistics()
    nmse = {}
    for number, side in enumerate(SIDES):
        deviations = (tensors[f"{side}.std"].square() * (rows - 1)).sum(-1).clamp_min(1e-300)
        errors = torch.from_numpy(np.sum([chunk.errors[number] for chunk in chunks], 0))
        nmse[side] = (errors / deviations).tolist()
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
        name: the data set's, for messages.

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
        if not bool(torch.isfinite(value).all()):
            layer = int((~torch.isfinite(value)).nonzero()[0, 0])
            raise DamagedError(
                f"{name}: its statistics {key} are not finite numbers at layer {layer}: generate it again"
            )
    return tensors
