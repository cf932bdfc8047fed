"""The norm of all gradients, and clipping to it, without reading a number back from a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins.model.sparse import row_squares

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel


def gradient_norm(parameters: Iterable[nn.Parameter], parallel: Parallel | None = None) -> Tensor:
    """The 2-norm of all gradients together, of all ranks, a scalar on their device.

    Where the product that made a gradient left the sums of squares of its rows (`row_squares`), it is not read again.
    """
    parameters = list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    if not with_grad:  # on no rank: a loss has a gradient on all or none
        return torch.zeros((), device=parameters[0].device)
    unknown = [p for p in with_grad if row_squares(p) is None]
    norms: dict[int, Tensor] = {}
    if unknown:
        # One fused call for all norms: a loop over parameters would be a kernel launch each.
        grads = [p.grad for p in unknown if p.grad is not None]
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms = {id(p): norm for p, norm in zip(unknown, torch._foreach_norm(grads, 2, wide), strict=True)}
    for p in with_grad:
        if (squares := row_squares(p)) is not None:
            norms[id(p)] = squares.sum().sqrt()
    if parallel is None or parallel.tensor_ranks == 1:
        return torch.stack([norms[id(p)] for p in with_grad]).norm()
    # A parameter that every rank has all of counts once; of the others each rank has its own rows.
    whole, split = (
        torch.stack([norms[id(p)] for p in with_grad if _is_split(p) == cut] or [norms[id(with_grad[0])] * 0])
        for cut in (False, True)
    )
    return (parallel.total(split.square().sum()) + whole.square().sum()).sqrt()


def forget_squares(parameters: Iterable[Any]) -> None:
    """What is known of the rows of gradients holds no longer: they were averaged over ranks."""
    for p in parameters:
        p.grad_squares = None


def clip_gradients(
    parameters: Iterable[nn.Parameter], norm: Tensor, limit: float, optimizer: torch.optim.Optimizer
) -> None:
    """Scale all gradients by limit / norm where the norm is larger, or let the optimizer's next step do it.

    Some optimizers divide each gradient by a number as they read it, so that no pass over the gradients is needed
    (torch's fused ones: `grad_scale`, made for mixed precision). That number is float32. For others, and for float64
    parameters, the gradients are scaled here.
    """
    # The factor stays on the device: an `if norm > limit` would wait for it.
    with_grad = [p for p in parameters if p.grad is not None]
    scale = (norm / limit).clamp_min(1.0)
    reads_scale = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not reads_scale or any(p.dtype == torch.float64 for p in with_grad):
        torch._foreach_div_([p.grad for p in with_grad if p.grad is not None], scale)
    else:
        optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]


def _is_split(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "feature_axis", None) is not None
