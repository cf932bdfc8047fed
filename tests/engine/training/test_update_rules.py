"""Clipping, and k over a run, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clt_optimizers.bf16 import AdamBF16
from clt_plugins import Piece
from clt_plugins.training.optimizers.clip import clip_gradients, forget_squares, gradient_norm
from tests.support.helpers import parts

STEPS = 40


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("limit", [0.5, 3.0, 1e9])
def test_clipping_multiplies_every_gradient_by_limit_over_norm_where_the_norm_is_larger(
    limit: float, dtype: str
) -> None:
    """Seen by what the optimizer makes of it; with beta1 of 0.9 a first moment is a tenth of the gradient."""
    numbers = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in ((3, 4), (5,), (2, 2, 2))]
    pieces = {p: [Piece("p")] for p in parameters}
    # A fused one divides gradients as it reads them; the engine scales those of the other.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam(parameters, fused=True),
        torch.optim.Adam(parameters, foreach=False),
    ]
    if dtype == "float32":
        optimizers.append(
            AdamBF16(parameters, betas=(0.9, 0.95), eps=1e-8, decoupled=False, pieces=pieces, moments=torch.float32)
        )
    # The factor is float32 but for float64 parameters: two roundings of it, and two of the gradient.
    tolerance = 1e-12 if dtype == "float64" else 4 * 2**-24
    for optimizer in optimizers:
        for p in parameters[:2]:
            p.grad = torch.randn(p.shape, generator=numbers, dtype=kind)
        before = [p.grad.flatten().tolist() for p in parameters if p.grad is not None]
        norm = math.sqrt(sum(x**2 for gradient in before for x in gradient))
        assert float(gradient_norm(parameters)) == pytest.approx(norm, rel=tolerance)
        clip_gradients(parameters, gradient_norm(parameters), limit, optimizer)
        optimizer.step()
        factor = limit / norm if norm > limit else 1.0
        for p, gradient in zip(parameters, before, strict=False):
            expected = [x * factor / 10 for x in gradient]
            moment = optimizer.state[p]["exp_avg"].flatten().tolist()
            assert moment == pytest.approx(expected, rel=2 * tolerance), type(optimizer)


def test_sums_of_squares_that_a_product_left_are_the_norm() -> None:
    """They are used instead of the gradient: other numbers show. After a change of the gradient they are not."""
    p, other = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))
    p.grad, other.grad = torch.ones(2, 3), torch.full((1,), 2.0)
    p.grad_buffer, p.grad_version = p.grad, p.grad._version  # type: ignore[attr-defined]
    p.grad_squares = torch.tensor([4.0, 1.0])  # type: ignore[attr-defined]
    assert float(gradient_norm([p, other])) == pytest.approx(3.0)
    p.grad.mul_(1.0)
    assert float(gradient_norm([p, other])) == pytest.approx(10**0.5)
    p.grad_version = p.grad._version  # type: ignore[attr-defined]
    forget_squares([p])
    assert float(gradient_norm([p, other])) == pytest.approx(10**0.5)


def test_a_gradient_of_zero_stays_zero() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p], fused=True)
    p.grad = torch.zeros(3)
    clip_gradients([p], gradient_norm([p]), 1.0, optimizer)
    optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_k_at_every_share_of_the_steps(name: str) -> None:
    k, start, over = 4, 2.5, 0.6
    chosen = {"name": name, "k": k, "anneal_from": start, "anneal_over": over}
    activation: Any = parts(activation=chosen).transcoder.activation
    for step in range(STEPS + 1):
        done = step / STEPS
        activation.schedule(done)
        line = k if done >= over else k * start + (k - k * start) * done / over
        assert abs(activation.training_k[0] - line) <= 0.5 + 1e-9, "the nearest count to the line"
        assert activation.k == [k], "what evaluation uses"
