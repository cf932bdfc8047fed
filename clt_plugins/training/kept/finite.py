"""Moments of a checkpoint with which training would go on unseen: an infinite one holds its weight for ever, and after
infinitely many steps a rate no longer warms up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from clt_plugins.errors import Refused

if TYPE_CHECKING:
    import torch

    from clt_plugins.model.transcoder import CrossLayerTranscoder


def check_finite(path: Path, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> None:
    """Refuse moments of weights or rows, and a count of steps, that are NaN or infinite.

    Another single number may be infinite on purpose, such as a least value so far.

    Args:
        path: of the file that it was read from.

    Raises:
        Refused: names the tensor.
    """
    for name, parameter in transcoder.named_parameters():
        for kept, value in optimizer.state.get(parameter, {}).items():
            if not _finite(kept, value):
                text = "not finite: the file is damaged, or was written by a broken run"
                raise Refused(path, f"{kept} of {name}: {text}")


def _finite(kept: str, value: object) -> bool:
    if isinstance(value, Tensor) and value.dim():
        return not value.is_floating_point() or bool(value.isfinite().all())
    return kept != "step" or not isinstance(value, Tensor | float) or math.isfinite(value)
