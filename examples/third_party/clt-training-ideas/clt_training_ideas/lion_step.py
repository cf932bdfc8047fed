"""The torch optimizer of `lion`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from clt_plugins import Weight
    from clt_training_ideas.lion import LionConfig


class Lion(torch.optim.Optimizer):
    """Each number moves by itself, so ranks that share the features need nothing of each other."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Nothing is read back from the device."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum.lerp(p.grad, 1 - group["beta1"]).sign_() * group["lr"])
                momentum.lerp_(p.grad, 1 - group["beta2"])


class LionMaker:
    """An `Optimizer`."""

    def __init__(self, config: LionConfig):
        self.config = config

    def make(self, weights: Sequence[Weight]) -> Lion:
        """A group for each pair of rates."""
        by_rates: dict[tuple[float, float], list[Any]] = {}
        for weight in weights:
            rates = weight.lr_factor, self.config.weight_decay if weight.rows else 0.0
            by_rates.setdefault(rates, []).append(weight.parameter)
        groups = [
            {"params": parameters, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in by_rates.items()
        ]
        return Lion(groups, {"lr": 0.0, "beta1": self.config.beta1, "beta2": self.config.beta2})

    def state_bytes(self, weight: Weight) -> int:
        """The momentum."""
        return weight.parameter.numel() * weight.parameter.element_size()
