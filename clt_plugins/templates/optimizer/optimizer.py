"""The torch optimizer, and what makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from clt_plugins import Weight
    from clt_plugins.templates.optimizer import ExampleConfig


class SignMomentum(torch.optim.Optimizer):
    """A torch optimizer as any other. Its state beside each parameter is what checkpoints hold."""

    def __init__(self, groups: list[dict[str, Any]], config: ExampleConfig):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Nothing is read back from the device."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # no loss reached it in this step
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                direction = state["momentum"].lerp(p.grad, 1 - self.config.beta).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction * group["lr"])
                state["momentum"].lerp_(p.grad, 1 - self.config.momentum)


class Example:
    """An `Optimizer`."""

    def __init__(self, config: ExampleConfig):
        self.config = config

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        """A group for each pair of rates: matrices decay, and a plugin may have its weights learn faster (`lr_factor`).
        The engine sets `lr` of every group in every step, times its `lr_factor`."""
        by_rates: dict[tuple[float, float], list[Any]] = {}
        for weight in weights:
            rates = weight.lr_factor, self.config.weight_decay if weight.rows else 0.0
            by_rates.setdefault(rates, []).append(weight.parameter)
        groups = [
            {"params": parameters, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in by_rates.items()
        ]
        return SignMomentum(groups, self.config)

    def state_bytes(self, weight: Weight) -> int:
        """One momentum of every number."""
        return weight.parameter.numel() * weight.parameter.element_size()
