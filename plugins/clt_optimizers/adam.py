"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from clt_optimizers import AdamWConfig
from clt_optimizers.bf16 import AdamBF16
from clt_optimizers.groups import groups

if TYPE_CHECKING:
    from clt_optimizers import AdamConfig
    from clt_plugins import Context, Weight


class MakesAdam:
    """Torch's fused Adam or AdamW; `AdamBF16` where weights or moments are bfloat16."""

    def __init__(self, config: AdamConfig, context: Context):
        self.config = config
        self.context = context
        self.decoupled = isinstance(config, AdamWConfig)

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        """On a GPU the rate is a tensor there, as is the count of steps: a CUDA graph of a step can be captured."""
        config, device = self.config, self.context.device
        beta1, beta2 = config.betas
        by_rates = groups(weights, config)
        optimizer: torch.optim.Optimizer
        # torch's fused optimizers keep moments in the parameters' type, and round both to the nearest.
        if config.states == "bf16" or any(weight.parameter.dtype == torch.bfloat16 for weight in weights):
            optimizer = AdamBF16(
                by_rates,
                betas=(beta1, beta2),
                eps=config.eps,
                decoupled=self.decoupled,
                moments=torch.bfloat16 if config.states == "bf16" else torch.float32,
                split=config.bf16_weights == "split",
                pieces={weight.parameter: weight.pieces for weight in weights},
                kernels=self.context.kernels,
            )
        else:
            kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
            capturable = device.type == "cuda"
            optimizer = kind(by_rates, betas=(beta1, beta2), eps=config.eps, fused=True, capturable=capturable)
        if device.type == "cuda":
            for group in optimizer.param_groups:  # not at once: torch reads the first rate back to check it
                group["lr"] = torch.zeros((), device=device)
        return optimizer

    def state_bytes(self, weight: Weight) -> int:
        """Two moments, and the lower halves of weights."""
        config, dtype = self.config, weight.parameter.dtype
        moment = 2 if config.states == "bf16" else torch.promote_types(dtype, torch.float32).itemsize
        halves = 2 if config.bf16_weights == "split" and dtype == torch.bfloat16 else 0
        return (2 * moment + halves) * weight.parameter.numel()
