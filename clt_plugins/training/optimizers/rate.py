"""The learning rate: by the size of a transcoder and of its run, and set for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from torch import Tensor

if TYPE_CHECKING:
    import torch

    from clt_plugins.contract.recipe import TrainConfig

LR_BY_SIZE = 0.25
SHORT_STEPS = 600
"""A learning rate that is not given is LR_BY_SIZE over the root of the number of features (Gao et al. 2024, arXiv
2406.04093, appendix A.3, found the root), and in runs of more than SHORT_STEPS steps times the root of SHORT_STEPS over
the steps. That longer runs want lower rates is known of language models (Bjorck et al. 2024, arXiv 2409.19913; Shen et
al. 2024, arXiv 2408.13359). Both numbers and the second root are measured, see examples/guides/defaults.md."""


def with_rate(config: TrainConfig, features: int) -> TrainConfig:
    """The same settings with a learning rate, by the size of the transcoder and of the run where none is given.

    Args:
        features: of all layers and ranks together.
    """
    if config.lr is not None:
        return config
    steps = config.schedule_steps or config.steps
    rate = LR_BY_SIZE * features**-0.5 * min(1.0, SHORT_STEPS / steps) ** 0.5
    return attrs.evolve(config, lr=float(f"{rate:.2g}"))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters, times the factor of their group. A rate on a GPU keeps its address, as a
    CUDA graph needs."""
    for group in optimizer.param_groups:
        of_group = rate * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group
