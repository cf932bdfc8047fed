"""Adam with moments in bfloat16: half the optimizer's memory, kept unbiased by stochastic rounding.

Rounded to the nearest, a second moment in bfloat16 stops moving: a change of (1 - beta2) of its size is below half its
last bit. Rounded up or down at random, in proportion, it is right on average (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22
"""Numbers widened to float32 at a time: the memory saved is not spent on temporaries."""


def round_stochastically(x: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Write float32 numbers as bfloat16, each to one of its two neighbours, the nearer one more often."""
    noise = torch.randint(0, 2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    # Adding up to one unit in the last kept place, then cutting: the carry goes up with the right probability.
    bits = (x.contiguous().view(torch.int32) + noise) & -(2**16)
    out.copy_(bits.view(torch.float32))


class AdamBF16(torch.optim.Optimizer):
    """Adam, or AdamW with weight decay; `exp_avg` and `exp_avg_sq` are bfloat16, the arithmetic is float32.

    Random bits depend on `seed` and the step only, so a resumed run rounds as the unbroken one.
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
                state["step"] += 1
                generator = torch.Generator(parameter.device)
                generator.manual_seed((self.seed * 1_000_003 + int(state["step"])) * 1_009 + number)
                self._update(parameter, state, group, generator)

    def _update(
        self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], generator: torch.Generator
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
        for value, grad, first, second in pieces:
            grad = grad.float()
            if group["weight_decay"] and not self.decoupled:
                grad = grad.add(value, alpha=group["weight_decay"])
            mean = first.float().lerp_(grad, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if group["weight_decay"] and self.decoupled:
                value.mul_(1 - group["lr"] * group["weight_decay"])
            value.sub_((rate * mean / ((square / (1 - beta2**step)).sqrt_().add_(group["eps"]))).to(value.dtype))
            round_stochastically(mean, first, generator)
            round_stochastically(square, second, generator)
