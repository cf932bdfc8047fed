"""Adam where weights or moments are bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins import AdamUpdate, Piece, Updates, row_squares, update_rows

if TYPE_CHECKING:
    from clt_plugins import Kernels


class AdamBF16(torch.optim.Optimizer):
    """Adam, or AdamW with decoupled weight decay, for bfloat16 weights, bfloat16 moments, or both.

    The arithmetic is float32; `AdamUpdate` defines it. Rounded to the nearest, a second moment in bfloat16 stops
    moving, as a change of (1 - beta2) of its size is below half its last bit; so does a weight at a small learning
    rate. Here both are rounded up or down at random, in proportion, which is right on average; or (`split`) a weight is
    the upper half of a float32, whose lower half is kept beside the moments.

    Random bits depend on the seed, the step and the element's place in the complete parameter. So a resumed run rounds
    like one that never stopped, and any number of ranks like one process.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        pieces: Mapping[nn.Parameter, Sequence[Piece]],
        lr: float = 1e-3,
        moments: torch.dtype = torch.bfloat16,
        split: bool = False,
        kernels: Kernels | None = None,
    ):
        """
        Args:
            pieces: how parameters are cut.
            split: keep the lower halves of bfloat16 weights.
            kernels: what computes the update, where they can (`Updates`).
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._step_supports_amp_scaling = True
        self.decoupled = decoupled
        self.grad_scale: Tensor | None = None
        """What gradients are divided by, a scalar on the device; None: by nothing."""
        self.pieces = pieces
        self.update: Callable[[AdamUpdate], None] = update_rows
        if isinstance(kernels, Updates):
            self.update = kernels.update_rows
        for p in [p for group in self.param_groups for p in group["params"]]:
            # On a GPU the count is there too: nothing is copied from the CPU in a step.
            state = {"step": torch.zeros((), device=p.device if p.device.type == "cuda" else "cpu")}
            state |= {key: torch.zeros_like(p, dtype=moments) for key in ("exp_avg", "exp_avg_sq")}
            if split and p.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(p, dtype=torch.int16)
            self.state[p] = state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if not with_grad:
                continue
            steps = [self.state[p]["step"] for p in with_grad]
            torch._foreach_add_(steps, 1)
            # By a few operations for all parameters, in float64: 1 - beta2^step is small at first.
            scalars = self._scalars(torch.stack(steps).double(), group)
            for p, numbers in zip(with_grad, scalars, strict=True):
                for update in self._updates(p, numbers.to(p.device), group):
                    # Kernels compute in float32.
                    (update_rows if p.dtype == torch.float64 else self.update)(update)

    def _scalars(self, steps: Tensor, group: Mapping[str, Any]) -> Tensor:
        """`AdamUpdate.scalars` of parameters that were updated so many times, [P, 5]."""
        beta1, beta2 = group["betas"]
        lr = torch.ones_like(steps) * group["lr"]
        scale = torch.ones_like(steps) if self.grad_scale is None else self.grad_scale.to(steps).expand_as(steps)
        bias1, bias2 = 1 - torch.pow(beta1, steps), 1 - torch.pow(beta2, steps)
        decay = lr * (group["weight_decay"] if self.decoupled else 0.0)
        numbers = [1 / scale, lr / bias1, bias2.rsqrt(), decay, steps]
        # Rows of 32 bytes: Triton compiles a kernel anew for addresses of another alignment.
        return torch.stack([*numbers, *[steps] * 3], 1).float()[:, :5]

    def _updates(self, parameter: nn.Parameter, scalars: Tensor, group: Mapping[str, Any]) -> Iterable[AdamUpdate]:
        state, squares = self.state[parameter], row_squares(parameter)
        assert parameter.grad is not None
        grad = parameter.grad.contiguous()
        beta1, beta2 = group["betas"]
        for piece in self.pieces[parameter]:
            weight = piece.view(parameter.detach())
            columns = weight.shape[-1] if weight.dim() else 1
            rows = weight.numel() // max(columns, 1)
            if not rows:
                continue  # a rank without features

            def cut(x: Tensor, piece: Piece = piece, shape: tuple[int, int] = (rows, columns)) -> Tensor:
                return piece.view(x).view(shape)

            first = (weight.storage_offset() - parameter.storage_offset()) // columns
            yield AdamUpdate(
                weight=cut(parameter.detach()),
                low=cut(state["low"]) if "low" in state else None,
                grad=cut(grad),
                mean=cut(state["exp_avg"]),
                square=cut(state["exp_avg_sq"]),
                grad_squares=None if squares is None else squares[first : first + rows],
                scalars=scalars,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=0.0 if self.decoupled else group["weight_decay"],
                key=piece.key,
                **piece.numbering(weight.shape),
            )
