"""Learning rates: by the size of a transcoder, and of every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
from torch import Tensor

if TYPE_CHECKING:
    import torch

    from clt_plugins.contract.recipe import TrainConfig

LINEAR_END = 0.1
"""The linear schedule ends at this share of the learning rate, as the reference library's does."""


LR_BY_SIZE = 0.25
"""A learning rate that is not given is this over the root of the number of features (Gao et al. 2024, arXiv
2406.04093, appendix A.3, found the root; the factor is measured, see examples/README.md)."""


def with_rate(config: TrainConfig, features: int) -> TrainConfig:
    """The same settings with a learning rate, by size where none is given.

    Args:
        features: of all layers and ranks together.
    """
    return config if config.lr is not None else attrs.evolve(config, lr=float(f"{LR_BY_SIZE * features**-0.5:.2g}"))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (counted from 0): warm-up from lr / warmup_steps, then the schedule.

    The settings have a rate (`with_rate`). `linear` falls to a tenth, `cosine` to 0, `linear_final20` is constant for
    80 % of the steps, then falls to 0.
    """
    assert config.lr is not None
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    steps = config.schedule_steps or config.steps
    share = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    if config.schedule == "linear":
        return config.lr * (1 - (1 - LINEAR_END) * share)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "linear_final20":
        done = min(1.0, step / steps)
        return config.lr * min(1.0, (1 - done) / 0.2)
    return config.lr


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters. A rate on a GPU keeps its address, as a CUDA graph needs."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
