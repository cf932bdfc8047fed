"""Adafactor, torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clt_optimizers.groups import groups, refuse_split

if TYPE_CHECKING:
    from clt_optimizers import AdafactorConfig
    from clt_plugins import Context, Weight


class MakesAdafactor:
    """Makes `torch.optim.Adafactor`, which factors the second moment over the last two axes of a parameter."""

    def __init__(self, config: AdafactorConfig, context: Context):
        refuse_split("adafactor", context)
        self.config = config

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        config = self.config
        by_rates = groups(weights, config)
        return torch.optim.Adafactor(by_rates, beta2_decay=config.beta2_decay, eps=(None, config.eps), d=config.clip)

    def state_bytes(self, weight: Weight) -> int:
        """A row and a column of every matrix; as many numbers as a vector has."""
        p = weight.parameter
        if p.dim() < 2:
            return p.numel() * p.element_size()
        matrices, (rows, columns) = p.shape[:-2].numel(), p.shape[-2:]
        return matrices * (rows + columns) * p.element_size()
