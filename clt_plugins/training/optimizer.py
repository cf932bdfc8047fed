"""Adam and AdamW, learning-rate schedules, gradient norms.

Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from clt_plugins.training.rounding import AdamBF16

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.recipe.read import TrainConfig

LINEAR_END = 0.1
"""The linear schedule ends at this share of the learning rate, as the reference library's does."""


LR_BY_SIZE = 0.25
"""A learning rate that is not given is this over the root of the number of features (Gao et al. 2024, arXiv
2406.04093, appendix A.3, found the root; the factor is measured, see examples/README.md)."""


def settled(config: TrainConfig, features: int) -> TrainConfig:
    """The same settings with a learning rate.

    Args:
        features: of all layers and ranks together.
    """
    return config if config.lr is not None else attrs.evolve(config, lr=float(f"{LR_BY_SIZE * features**-0.5:.2g}"))


def make_optimizer(model: CrossLayerTranscoder, config: TrainConfig, seed: int = 0) -> torch.optim.Optimizer:
    """Fused Adam(W) over a model's parameters. Weight decay applies to matrices, not to biases and thresholds.

    The learning rate is set anew in every step, by `learning_rate`. With `states = "bf16"` the moments are bfloat16,
    rounded stochastically: see `rounding`.
    """
    matrices = [p for p in model.parameters() if is_matrix(p, model.d_model)]
    others = [p for p in model.parameters() if not is_matrix(p, model.d_model)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    config = settled(config, model.layers * model.features)
    assert config.lr is not None
    beta1, beta2 = config.betas
    if config.states == "bf16":
        decoupled = config.optimizer == "adamw"
        return AdamBF16(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, decoupled=decoupled, seed=seed)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def is_matrix(parameter: nn.Parameter, d_model: int) -> bool:
    """Whether a parameter holds rows of d_model numbers, of features or between dimensions; not a bias or threshold."""
    per_feature = getattr(parameter, "feature_axis", None) is not None
    return parameter.shape[-1] == d_model and parameter.dim() >= (2 if per_feature else 3)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (counted from 0): warm-up from lr / warmup_steps, then the schedule.

    The settings are `settled`. `linear` falls to a tenth, `cosine` to 0, `linear_final20` is constant for 80 % of the
    steps, then falls to 0.
    """
    assert config.lr is not None
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - (1 - LINEAR_END) * share)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "linear_final20":
        done = step / config.steps
        return config.lr * min(1.0, (1 - done) / 0.2)
    return config.lr


def gradient_norm(parameters: Iterable[nn.Parameter], parallel: Parallel | None = None) -> Tensor:
    """The 2-norm of all gradients together, of all ranks, a scalar on their device."""
    with_grad = [p for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm([p.grad for p in with_grad if p.grad is not None]))
    if parallel is None or parallel.tensor_ranks == 1:
        return norms.norm()
    # What is whole on every rank counts once.
    split = torch.tensor([getattr(p, "feature_axis", None) is not None for p in with_grad], device=norms.device)
    squares = norms.square()
    return (parallel.total((squares * split).sum()) + (squares * ~split).sum()).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where the norm is larger; without reading it back."""
    factor = (limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
