"""Schedules by their formulas, clipping, and bfloat16 moments against float32 ones."""

from __future__ import annotations

import math

import pytest
import torch

from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizer import (
    AdamBF16,
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    round_stochastically,
)
from tests.support.helpers import parts, random_batch

STEPS = 100


def rates(schedule: str, warmup: int = 0) -> list[float]:
    config = TrainConfig(steps=STEPS, lr=2.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(config, step) for step in range(STEPS)]


def test_constant_stays():
    assert rates("constant") == [2.0] * STEPS


def test_linear_falls_evenly_to_a_tenth():
    found = rates("linear")
    assert found[0] == 2.0 and found[50] == pytest.approx(2 * 0.55) and found[99] == pytest.approx(2 * (1 - 0.9 * 0.99))


def test_cosine_falls_to_zero():
    found = rates("cosine")
    assert found[0] == 2.0 and found[25] == pytest.approx(1 + math.sqrt(0.5)) and found[99] < 0.001


def test_linear_final20_is_constant_then_falls_to_zero():
    found = rates("linear_final20")
    assert (
        found[:81] == pytest.approx([2.0] * 81) and found[90] == pytest.approx(1.0) and found[99] == pytest.approx(0.1)
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "linear_final20"])
def test_every_schedule_warms_up(schedule):
    assert rates(schedule, 10)[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates(schedule, 10)[10] == pytest.approx(2.0)


def test_clipping_scales_all_gradients_by_their_common_norm():
    first, second = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 5))
    first.grad, second.grad = torch.full((3,), 4.0), torch.full((5,), -2.0)
    norm = gradient_norm([first, second])
    assert norm == pytest.approx(math.sqrt(3 * 16 + 5 * 4))
    clip_gradients([first, second], norm, 100.0)
    assert first.grad.tolist() == [4.0] * 3, "below the limit nothing changes"
    clip_gradients([first, second], norm, 1.0)
    assert gradient_norm([first, second]) == pytest.approx(1.0)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((100_000,), 1.0 + 0.25 * 2**-7)  # a quarter of the way between two bfloat16 numbers
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_stochastically(x, out, generator)
    assert set(out.float().tolist()) == {1.0, 1.0 + 2**-7}
    share = (out.float() > 1).float().mean()
    assert abs(share - 0.25) < 0.006, "four standard deviations of 100,000 draws"
    exact = torch.tensor([0.0, -1.5, 3.0, 2.0**-120])
    out = torch.empty(4, dtype=torch.bfloat16)
    round_stochastically(exact, out, generator)
    assert torch.equal(out.float(), exact)


def test_bfloat16_moments_follow_float32_ones():
    """A quadratic: after 300 steps both are at its minimum, to within the steps' own noise."""
    goal = torch.linspace(-1, 1, 64)
    ends = []
    for kind in ("bf16", "fp32"):
        x = torch.nn.Parameter(torch.zeros(64))
        optimizer: torch.optim.Optimizer
        if kind == "bf16":
            optimizer = AdamBF16([x], lr=0.02, betas=(0.9, 0.999), eps=1e-8, decoupled=False, seed=0)
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
        transcoder = parts(train={"states": states}).transcoder
        config = TrainConfig(steps=1, optimizer="adamw", weight_decay=0.5, lr=0.1, states=states)
        optimizer = make_optimizer(transcoder, config)
        before = {name: p.detach().clone() for name, p in transcoder.named_parameters()}
        for p in transcoder.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in transcoder.named_parameters():
            factor = 0.95 if name in ("W_enc", "tying.weight") else 1.0
            torch.testing.assert_close(p.detach(), before[name] * factor)


def test_bfloat16_products_select_nearly_the_same_and_give_float32_values():
    exact, rough = (parts(train={"precision": precision}) for precision in ("fp32", "bf16"))
    batch = random_batch(16, 3, 6)
    first, second = exact.transcoder.encode(batch.inputs), rough.transcoder.encode(batch.inputs)
    both = (first.dense() > 0) & (second.dense() > 0)
    assert both.sum() > 0.9 * (first.dense() > 0).sum(), "rounding changes only which of two near-equals is kept"
    torch.testing.assert_close(first.dense()[both], second.dense()[both], rtol=1e-5, atol=1e-6)
