"""Averages of weights over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins import Step, Training, buffer

if TYPE_CHECKING:
    from clt_callbacks import EMAConfig


class EMA(nn.Module):
    """A `Callback`. Its averages are buffers, in float32 at least: steps of an average in bfloat16 would be lost."""

    def __init__(self, config: EMAConfig):
        super().__init__()
        self.decay, self.every = config.decay, config.every
        self.names: dict[str, str] = {}
        """A parameter's name -> the buffer's."""

    def start(self, run: Training) -> None:
        """Make the averages, which begin at the weights as they are."""
        for name, weight in run.weights().items():
            self.names[name] = name.replace(".", "_")
            wide = torch.promote_types(weight.dtype, torch.float32)
            self.register_buffer(self.names[name], buffer(weight.to(wide, copy=True), like=name))
        run.evaluate_with(lambda: self.averages() if self._has_begun(run) else {})

    def averages(self) -> dict[str, Tensor]:
        """By the names of the parameters."""
        return {name: self.get_buffer(own) for name, own in self.names.items()}

    def _has_begun(self, run: Training) -> bool:
        """Whether there was an update: before the first one the averages are the initial weights."""
        return run.step >= self.every

    def after(self, run: Training, step: Step) -> None:
        """Move the averages towards the weights: average += (1 - decay) · (weight - average)."""
        done = run.step // self.every - 1
        decay = min(self.decay, done / (done + 9))
        weights = run.weights()
        pairs = [(average, weights[name].to(average.dtype)) for name, average in self.averages().items()]
        torch._foreach_lerp_([average for average, _ in pairs], [weight for _, weight in pairs], 1 - decay)

    def finish(self, run: Training) -> None:
        """The transcoder that is saved has the averages."""
        if self._has_begun(run):
            run.set_weights(self.averages())

    def state_bytes(self, transcoder: Any) -> int:
        """Bytes of the averages."""
        trained = [p for p in transcoder.parameters() if p.requires_grad]
        return sum(p.numel() * max(4, p.element_size()) for p in trained)
