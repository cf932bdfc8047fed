"""Saved tensors against those of a transcoder."""

from __future__ import annotations

from typing import Any

import torch

from clt_plugins.errors import Refused
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.model.parameters import check_finite


def check_tensors(stored: SlicedTensors, transcoder: Any) -> None:
    """Whether saved tensors are those of a transcoder, which may be on the device "meta".

    Raises:
        Refused: a tensor is missing, left over, or of another shape; names it.
    """
    targets, axes = transcoder.tensors(), transcoder.feature_axes()
    for name in targets.keys() ^ stored.shapes.keys():
        lacking = "lacks" if name in targets else "has an unknown"
        raise Refused(stored.folder, f"{lacking} tensor {name!r}")
    for name, target in targets.items():
        shape, axis = list(target.shape), axes[name]
        if axis is not None:
            shape[axis] = transcoder.n_features
        if shape != stored.shapes[name]:
            raise Refused(stored.folder, f"tensor {name!r} is {stored.shapes[name]}, expected {shape}")


@torch.no_grad()
def copy_tensors(stored: SlicedTensors, transcoder: Any) -> None:
    """Copy saved tensors, or this rank's part of them, into a transcoder's parameters and statistics.

    Raises:
        Refused: see `check_tensors`; or what was learned is not finite; names it.
    """
    check_tensors(stored, transcoder)
    axes = transcoder.feature_axes()
    for name, target in transcoder.tensors().items():
        axis = axes[name]
        value = stored.read(name) if axis is None else stored.read_part(name, axis, transcoder.own)
        check_finite(transcoder, name, value, stored.folder)
        target.copy_(value)
