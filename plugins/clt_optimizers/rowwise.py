"""Adam with one second moment for each row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clt_optimizers.groups import groups

if TYPE_CHECKING:
    from clt_optimizers import RowwiseAdamConfig
    from clt_plugins import Context, Weight


class RowwiseAdam(torch.optim.Optimizer):
    """Adam whose second moment is one number for each row of a matrix (its last axis); of all else it is Adam's.

    With g the gradient, m and v the moments, w the weight, t the step, and rows of D numbers:

        m = beta1 · m + (1 - beta1) · g
        v = beta2 · v + (1 - beta2) · mean over the row of g²
        w = w - lr · weight_decay · w
        w = w - lr / (1 - beta1^t) · m / (sqrt(v / (1 - beta2^t)) + eps)

    After Adam-mini (Zhang et al. 2024, arXiv 2406.16793), whose blocks are rows here: a row is one feature's direction,
    which has one size of gradient. A rank has whole rows, so several ranks compute what one process does.
    """

    def __init__(self, params: Iterable[Any], *, betas: tuple[float, float], eps: float, rows: set[nn.Parameter]):
        """
        Args:
            rows: the parameters that are matrices of rows.
        """
        super().__init__(params, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                moment = torch.zeros_like(p, memory_format=torch.contiguous_format)
                square = moment[..., :1] if p in rows else moment
                # The count stays on the CPU: the host needs the number, and a GPU never waits.
                self.state[p] = {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": torch.zeros_like(square)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                state = self.state[p]
                state["step"] += 1
                step = int(state["step"])
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                if square.shape == p.shape:
                    square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                else:
                    sums = torch.linalg.vector_norm(p.grad, dim=-1, keepdim=True).square_()
                    square.lerp_(sums.div_(p.shape[-1]), 1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


class MakesRowwiseAdam:
    """Makes `RowwiseAdam`."""

    def __init__(self, config: RowwiseAdamConfig, context: Context):
        self.config = config

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        beta1, beta2 = self.config.betas
        rows = {weight.parameter for weight in weights if weight.rows}
        return RowwiseAdam(groups(weights, self.config), betas=(beta1, beta2), eps=self.config.eps, rows=rows)

    def state_bytes(self, weight: Weight) -> int:
        """A first moment of every number, a second one of every row."""
        p = weight.parameter
        seconds = p.numel() // max(1, p.shape[-1]) if weight.rows else p.numel()
        return (p.numel() + seconds) * p.element_size()
