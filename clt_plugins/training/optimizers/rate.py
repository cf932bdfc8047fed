"""The learning rate: by the size of a transcoder, and set for every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from torch import Tensor

if TYPE_CHECKING:
    import torch

    from clt_plugins.contract.recipe import TrainConfig

LR_BY_SIZE = 0.25
"""A learning rate that is not given is this over the root of the number of features (Gao et al. 2024, arXiv
2406.04093, appendix A.3, found the root; the factor is measured, see examples/README.md)."""


def with_rate(config: TrainConfig, features: int) -> TrainConfig:
    """The same settings with a learning rate, by size where none is given.

    Args:
        features: of all layers and ranks together.
    """
    return config if config.lr is not None else attrs.evolve(config, lr=float(f"{LR_BY_SIZE * features**-0.5:.2g}"))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters, times the factor of their group. A rate on a GPU keeps its address, as a
    CUDA graph needs."""
    for group in optimizer.param_groups:
        of_group = rate * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group
