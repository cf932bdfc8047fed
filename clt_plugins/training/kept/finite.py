"""Moments of a checkpoint with which training would go on unseen: an infinite one holds its weight for ever."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from clt_plugins.errors import Refused

if TYPE_CHECKING:
    import torch

    from clt_plugins.model.transcoder import CrossLayerTranscoder


def check_finite(path: Path, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what the optimizer keeps of each weight where a number of it is NaN or infinite.

    Args:
        path: of the file that it was read from.

    Raises:
        Refused: names the tensor.
    """
    for name, parameter in transcoder.named_parameters():
        for kept, value in optimizer.state.get(parameter, {}).items():
            per_weight = isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
            if per_weight and not bool(value.isfinite().all()):
                text = "not finite: the file is damaged, or was written by a broken run"
                raise Refused(path, f"{kept} of {name}: {text}")
