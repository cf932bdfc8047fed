"""Numbers of a checkpoint that training would go on with unseen, as those of a feature that is never active."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from clt_plugins.errors import Refused

if TYPE_CHECKING:
    import torch

    from clt_plugins.model.transcoder import CrossLayerTranscoder


def check_finite(path: Path, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> None:
    """Refuse weights, and what the optimizer keeps of each number of them, where one is NaN or infinite.

    Args:
        path: of the checkpoint that they were read from.

    Raises:
        Refused: names file and tensor.
    """
    for file, name, value in _numbers(transcoder, optimizer):
        if not bool(value.isfinite().all()):
            text = f"{name}: not finite: the file is damaged, or was written by a broken run"
            raise Refused(path / f"{file}.safetensors", text)


def _numbers(transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """File, name, tensor."""
    for name, (owner, view, _) in transcoder.views().items():
        if name.startswith(("W_", "b_")):  # a threshold may be infinite
            yield "transcoder", name, view(transcoder.get_parameter(owner).detach())
    for name, parameter in transcoder.named_parameters():
        for kept, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
                yield "training", f"{kept} of {name}", value
