"""Adam and AdamW, learning-rate schedules, gradient norms.

Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from clt_plugins.data.random import generator

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.contract.recipe import TrainConfig
    from clt_plugins.model.transcoder import CrossLayerTranscoder

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


def make_optimizer(
    model: CrossLayerTranscoder, config: TrainConfig, seed: int = 0, extra: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Fused Adam(W) over a model's parameters. Weight decay applies to matrices, not to biases and thresholds.

    Args:
        extra: parameters of losses.

    The learning rate is set anew in every step, by `learning_rate`. With `states = "bf16"` the moments are bfloat16,
    rounded stochastically: see `AdamBF16`.
    """
    parameters = [*model.parameters(), *extra]
    matrices = [p for p in parameters if is_matrix(p, model.d_model)]
    others = [p for p in parameters if not is_matrix(p, model.d_model)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # The loop sets the rate before every step; the optimizer only needs some number to start with.
    config = with_rate(config, model.n_layers * model.n_features)
    assert config.lr is not None
    beta1, beta2 = config.betas
    # torch's fused optimizers keep moments in the parameters' type, so other types need one of our own.
    if config.states == "bf16":
        decoupled = config.optimizer == "adamw"
        return AdamBF16(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, decoupled=decoupled, seed=seed)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def is_matrix(parameter: nn.Parameter, d_model: int) -> bool:
    """Whether a parameter holds rows of d_model numbers, of features or between dimensions; not a bias or threshold."""
    per_feature = getattr(parameter, "feature_axis", None) is not None
    return parameter.dim() >= (2 if per_feature else 3) and parameter.shape[-1] == d_model


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


def gradient_norm(parameters: Iterable[nn.Parameter], parallel: Parallel | None = None) -> Tensor:
    """The 2-norm of all gradients together, of all ranks, a scalar on their device."""
    with_grad = [p for p in parameters if p.grad is not None]
    # One fused call for all norms: a loop over parameters would be a kernel launch each.
    norms = torch.stack(torch._foreach_norm([p.grad for p in with_grad if p.grad is not None]))
    if parallel is None or parallel.tensor_ranks == 1:
        return norms.norm()
    # A parameter that every rank has all of counts once; of the others each rank has its own rows.
    split = torch.tensor([getattr(p, "feature_axis", None) is not None for p in with_grad], device=norms.device)
    squares = norms.square()
    return (parallel.total((squares * split).sum()) + (squares * ~split).sum()).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where the norm is larger; without reading it back."""
    # The factor stays on the device: an `if norm > limit` would wait for it.
    factor = (limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


CHUNK = 2**22
"""Numbers widened to float32 at a time: the memory saved is not spent on temporaries."""


def round_stochastically(x: Tensor, out: Tensor, bits: torch.Generator) -> None:
    """Write float32 numbers as bfloat16, each to one of its two neighbours, the nearer one more often."""
    noise = torch.randint(0, 2**16, x.shape, generator=bits, device=x.device, dtype=torch.int32)
    # Adding up to one unit in the last kept place, then cutting: the carry goes up with the right probability.
    raised = (x.contiguous().view(torch.int32) + noise) & -(2**16)
    out.copy_(raised.view(torch.float32))


class AdamBF16(torch.optim.Optimizer):
    """Adam, or AdamW with weight decay, at half the optimizer's memory.

    `exp_avg` and `exp_avg_sq` are bfloat16, the arithmetic is float32.

    Rounded to the nearest, a second moment in bfloat16 stops moving: a change of (1 - beta2) of its size is below half
    its last bit. Rounded up or down at random, in proportion, it is right on average (Gupta et al. 2015, arXiv
    1502.02551). Random bits depend on `seed` and the step only, so a resumed run rounds like one that never stopped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        seed: int,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.decoupled = decoupled
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                # A new generator per parameter and step: the bits do not depend on what was drawn before.
                state["step"] += 1
                bits = generator(self.seed, "rounding", number, int(state["step"]), device=parameter.device)
                self._update(parameter, state, group, bits)

    def _update(
        self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], bits: torch.Generator
    ) -> None:
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        rate = group["lr"] / (1 - beta1**step)
        assert parameter.grad is not None
        pieces = zip(
            parameter.view(-1).split(CHUNK),
            parameter.grad.reshape(-1).split(CHUNK),
            state["exp_avg"].view(-1).split(CHUNK),
            state["exp_avg_sq"].view(-1).split(CHUNK),
            strict=True,
        )
        # Piece by piece, so that the float32 copies stay in cache and the memory saved is not spent on them.
        for value, grad, first, second in pieces:
            grad = grad.float()
            if group["weight_decay"] and not self.decoupled:
                grad = grad.add(value, alpha=group["weight_decay"])
            mean = first.float().lerp_(grad, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if group["weight_decay"] and self.decoupled:
                value.mul_(1 - group["lr"] * group["weight_decay"])
            value.sub_((rate * mean / ((square / (1 - beta2**step)).sqrt_().add_(group["eps"]))).to(value.dtype))
            round_stochastically(mean, first, bits)
            round_stochastically(square, second, bits)
