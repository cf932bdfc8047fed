"""Bfloat16 moments against float32 ones, and what decays; `test_update_rules` holds the formulas."""

from __future__ import annotations

import torch
from clt_plugins.training.optimizers.adam import AdamBF16

from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.reference import store
from tests.support.helpers import parts, random_batch


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
            factor = 0.95 if name in ("encoder.W_enc", "tying.weight") else 1.0
            torch.testing.assert_close(p.detach(), before[name] * factor)


def test_bfloat16_products_select_nearly_the_same_and_give_float32_values():
    exact, rough = (parts(train={"precision": precision}) for precision in ("fp32", "bf16"))
    batch = random_batch(16, 3, 6)
    first, second = exact.transcoder.encode(batch.inputs), rough.transcoder.encode(batch.inputs)
    both = (first.dense() > 0) & (second.dense() > 0)
    assert both.sum() > 0.9 * (first.dense() > 0).sum(), "rounding changes only which of two near-equals is kept"
    torch.testing.assert_close(first.dense()[both], second.dense()[both], rtol=1e-5, atol=1e-6)
