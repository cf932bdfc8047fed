"""The module of `uncertainty`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clt_plugins import parameter

if TYPE_CHECKING:
    from clt_plugins import Context, Forward
    from clt_training_ideas.uncertainty import UncertaintyConfig


class Uncertainty(torch.nn.Module):
    """A `Loss` with a parameter."""

    needs_pre = False

    def __init__(self, config: UncertaintyConfig, context: Context):
        super().__init__()
        self.weight = config.weight
        # Every rank sees the whole reconstruction, so each has the whole gradient of s.
        dtype = torch.promote_types(context.dtype, torch.float32)
        self.s = parameter(torch.full((context.n_layers,), config.start, dtype=dtype, device=context.device), None)

    def selection(self, tokens: int, idle_tokens: torch.Tensor) -> None:
        """None: it reads no pre-activations."""

    def forward(self, forward: Forward) -> dict[str, torch.Tensor]:
        error = (forward.reconstruction - forward.targets).square().mean((0, 2))
        return {"uncertainty": self.weight * (error * (-self.s).exp() + self.s).sum()}
