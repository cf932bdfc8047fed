"""Whether a loss has the derivatives that its values say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clt_plugins.contract.training.loss import Forward
from clt_plugins.testing.bench import as_now
from clt_plugins.testing.report import complain


def leaves(terms: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that a backward pass of terms adds gradients to."""
    found, seen, left = [], set[Any](), [x.grad_fn for x in terms.values() if x.grad_fn is not None]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [following for following, _ in node.next_functions if following is not None]
    return found


def compare(value: Tensor, rebuilt: Callable[[Tensor], Forward], loss: Any, name: str) -> None:
    """Autograd against central differences, along a fixed random direction, for each term."""
    # Away from 0, where a ReLU has no derivative.
    point = torch.where(value.detach().abs() < 1e-3, 0.1, value.detach()).requires_grad_()
    numbers = torch.Generator().manual_seed(0)
    direction = torch.randn(point.shape, generator=numbers, dtype=torch.float64)
    size = 1e-6
    restore = as_now(loss)

    def terms(x: Tensor) -> Mapping[str, Tensor]:
        restore()  # what a step changes in it
        return loss(rebuilt(x))

    # With gradients on, as in a step: a loss may count steps by that, and its state is taken back each time.
    up, down = terms(point + size * direction), terms(point - size * direction)
    for term, value_of_term in terms(point).items():
        numerical = float(up[term].detach() - down[term].detach()) / (2 * size)
        analytic = 0.0
        if value_of_term.requires_grad:
            (slope,) = torch.autograd.grad(value_of_term, point, allow_unused=True, retain_graph=True)
            analytic = 0.0 if slope is None else float((slope * direction).sum())
        # Central differences of float64 numbers near 1 are good to about 1e-9.
        if abs(analytic - numerical) > 1e-5 * max(1e-2, abs(numerical)):
            complain(
                f"the gradient of {term!r} by forward.{name} to be its derivative, {numerical:.6g} along a direction",
                "no gradient" if analytic == 0 else f"{analytic:.6g}",
                f"a `detach()`, `.item()`, `no_grad` or change in place of what comes from forward.{name}",
            )
