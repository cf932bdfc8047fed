"""Adam and AdamW number by number; bfloat16 moments against float32 ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clt_optimizers.bf16 import AdamBF16
from clt_plugins import Piece
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.reference import store
from tests.support.helpers import parts, random_batch, recipe


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)

    def bits(count: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (count,), generator=generator).int()

    x = torch.full((100_000,), 1.0 + 0.25 * 2**-7)  # a quarter of the way between two bfloat16 numbers
    out = torch.empty_like(x, dtype=torch.bfloat16)
    store(x, out, bits(len(x)))
    assert set(out.float().tolist()) == {1.0, 1.0 + 2**-7}
    share = (out.float() > 1).float().mean()
    assert abs(share - 0.25) < 0.006, "four standard deviations of 100,000 draws"
    exact = torch.tensor([0.0, -1.5, 3.0, 2.0**-120])
    out = torch.empty(4, dtype=torch.bfloat16)
    store(exact, out, bits(4))
    assert torch.equal(out.float(), exact)


def test_bfloat16_moments_follow_float32_ones():
    """A quadratic: after 300 steps both are at its minimum, to within the steps' own noise."""
    goal = torch.linspace(-1, 1, 64)
    ends = []
    for kind in ("bf16", "fp32"):
        x = torch.nn.Parameter(torch.zeros(64))
        optimizer: torch.optim.Optimizer
        if kind == "bf16":
            optimizer = AdamBF16([x], lr=0.02, betas=(0.9, 0.999), eps=1e-8, decoupled=False, pieces={x: [Piece("x")]})
        else:
            optimizer = torch.optim.Adam([x], lr=0.02, fused=True)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
            x.grad = x.detach() - goal
            optimizer.step()
        ends.append(x.detach())
        if kind == "bf16":
            assert optimizer.state[x]["exp_avg_sq"].dtype == torch.bfloat16
    assert (ends[0] - goal).abs().max() < 0.01 and (ends[1] - goal).abs().max() < 0.01


def test_adamw_decays_matrices_only():
    for states in ("fp32", "bf16"):
        chosen = recipe(optimizer={"name": "adamw", "weight_decay": 0.5, "states": states}, train={"lr": 0.1})
        transcoder = parts().transcoder
        optimizer = make_optimizer(transcoder, chosen)
        before = {name: p.detach().clone() for name, p in transcoder.named_parameters()}
        for p in transcoder.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in transcoder.named_parameters():
            factor = 0.95 if name in ("encoder.W_enc", "tying.weight") else 1.0
            torch.testing.assert_close(p.detach(), before[name] * factor)


def test_bfloat16_products_select_nearly_the_same_and_give_float32_values():
    exact, rough = (parts(train={"precision": precision}) for precision in ("fp32", "bf16"))
    batch = random_batch(16, 3, 6)
    first, second = exact.transcoder.encode(batch.inputs), rough.transcoder.encode(batch.inputs)
    both = (first.dense() > 0) & (second.dense() > 0)
    assert both.sum() > 0.9 * (first.dense() > 0).sum(), "rounding changes only which of two near-equals is kept"
    torch.testing.assert_close(first.dense()[both], second.dense()[both], rtol=1e-5, atol=1e-6)


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
    settings: dict[str, Any] = {"states": states, "betas": list(betas), "eps": eps, "weight_decay": decay}
    transcoder = parts(transcoder={"dtype": "float64" if states == "fp32" else "float32"}).transcoder
    optimizer = make_optimizer(transcoder, recipe(optimizer={"name": name, **settings}))
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
    transcoder = parts(transcoder={"dtype": "float32"}).transcoder
    optimizer = make_optimizer(transcoder, recipe(optimizer={"name": "adam", "states": "bf16"}))
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
