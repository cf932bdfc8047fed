"""What an optimizer step does to each number: schedules, clipping, Adam and AdamW, against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizers.adam import AdamBF16
from clt_plugins.training.optimizers.clip import clip_gradients, forget_squares, gradient_norm
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.schedule import learning_rate
from tests.support.helpers import parts

STEPS = 40


def rate(schedule: str, step: int, warmup: int, steps: int, highest: float) -> float:
    """The learning rate of a step, as the guide defines it."""
    if step < warmup:
        return highest * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return highest + (0.1 * highest - highest) * share
    if schedule == "cosine":
        return highest * (1 + math.cos(math.pi * share)) / 2
    if schedule == "linear_final20" and step > 0.8 * steps:
        return highest * (steps - step) / (0.2 * steps)
    return highest


@pytest.mark.parametrize("warmup", [0, 1, 7, STEPS - 1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "linear_final20"])
def test_the_learning_rate_of_every_step(schedule: str, warmup: int) -> None:
    config = TrainConfig(steps=STEPS, lr=3e-3, schedule=schedule, warmup_steps=warmup)
    for step in range(STEPS):
        expected = rate(schedule, step, warmup, STEPS, 3e-3)
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("limit", [0.5, 3.0, 1e9])
def test_clipping_multiplies_every_gradient_by_limit_over_norm_where_the_norm_is_larger(
    limit: float, dtype: str
) -> None:
    """Seen by what the optimizer makes of it; with beta1 of 0.9 a first moment is a tenth of the gradient."""
    numbers = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in ((3, 4), (5,), (2, 2, 2))]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(parameters, fused=True)]
    if dtype == "float32":
        optimizers.append(
            AdamBF16(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decoupled=False, seed=0, moments=torch.float32)
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


class ByHand:
    """Adam (Kingma & Ba 2015, algorithm 1), or AdamW (Loshchilov & Hutter 2019, algorithm 2), number by number."""

    def __init__(self, decoupled: bool, betas: tuple[float, float], eps: float, decay: float):
        self.decoupled, self.betas, self.eps, self.decay = decoupled, betas, eps, decay
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, x: float, g: float, lr: float) -> float:
        b1, b2 = self.betas
        self.t += 1
        if not self.decoupled:
            g = g + self.decay * x
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        if self.decoupled:
            x = x - lr * self.decay * x
        return x - lr * m / (math.sqrt(v) + self.eps)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_parameter_moves_as_the_paper_says(name: str, states: str, decay: float) -> None:
    """With bfloat16 states a moment is off by at most 2^-7 of itself after a step: one is exact to rounding, and the
    paths stay together within the moments' precision."""
    betas, eps, steps = (0.9, 0.95), 1e-3, 1 if states == "bf16" else 6
    settings: dict[str, Any] = {"optimizer": name, "states": states, "betas": list(betas), "eps": eps}
    config = TrainConfig(steps=steps, lr=1.0, weight_decay=decay, warmup_steps=0, **settings)
    transcoder = parts(transcoder={"dtype": "float64" if states == "fp32" else "float32"}).transcoder
    optimizer = make_optimizer(transcoder, config)
    numbers = torch.Generator().manual_seed(1)
    by_name = dict(transcoder.named_parameters())
    watched = {"encoder.W_enc": (1, 2, 3), "encoder.b_enc": (0, 4)}
    hand = {key: ByHand(name == "adamw", betas, eps, decay if key == "encoder.W_enc" else 0.0) for key in watched}
    x = {key: float(by_name[key].detach()[index]) for key, index in watched.items()}
    for step in range(steps):
        lr = 0.01 * (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in by_name.values():
            p.grad = torch.randn(p.shape, generator=numbers, dtype=torch.float64).to(p.dtype)
        for key, index in watched.items():
            x[key] = hand[key].step(x[key], float(by_name[key].grad[index]), lr)
        optimizer.step()
    # Moments are rounded when they are stored, after the step that they were used in.
    tolerance = 1e-12 if states == "fp32" else 1e-5
    for key, index in watched.items():
        assert float(by_name[key].detach()[index]) == pytest.approx(x[key], rel=tolerance, abs=tolerance * 0.01)


def test_bfloat16_moments_are_the_moments_rounded_to_a_neighbour() -> None:
    config = TrainConfig(steps=1, lr=0.1, states="bf16", betas=[0.9, 0.95])
    transcoder = parts(transcoder={"dtype": "float32"}).transcoder
    optimizer = make_optimizer(transcoder, config)
    numbers = torch.Generator().manual_seed(2)
    first = torch.zeros_like(transcoder.W_enc, dtype=torch.float64)
    second = torch.zeros_like(first)
    for p in transcoder.parameters():
        p.grad = torch.randn(p.shape, generator=numbers)
    for step in range(3):
        state = optimizer.state[transcoder.W_enc]
        if step:
            first, second = state["exp_avg"].double(), state["exp_avg_sq"].double()
        gradient = transcoder.W_enc.grad.double()
        exact = {"exp_avg": 0.9 * first + 0.1 * gradient, "exp_avg_sq": 0.95 * second + 0.05 * gradient.square()}
        optimizer.step()
        state = optimizer.state[transcoder.W_enc]
        for key, moment in exact.items():
            assert state[key].dtype == torch.bfloat16
            # bfloat16 keeps 8 bits, so neighbours are at most 2^-7 of a number apart; float32 adds its own 2^-23.
            assert bool(((state[key].double() - moment).abs() <= moment.abs() * (2**-7 + 1e-6)).all()), (step, key)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_k_at_every_share_of_the_steps(name: str) -> None:
    k, start, over = 4, 2.5, 0.6
    chosen = {"name": name, "k": k, "anneal_from": start, "anneal_over": over}
    activation: Any = parts(activation=chosen).transcoder.activation
    for step in range(STEPS + 1):
        done = step / STEPS
        activation.schedule(done)
        line = k if done >= over else k * start + (k - k * start) * done / over
        assert abs(activation.training_k - line) <= 0.5 + 1e-9, "the nearest count to the line"
        assert activation.k == k, "what evaluation uses"
