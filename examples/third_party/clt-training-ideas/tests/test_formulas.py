"""The formulas, by hand: the conformance kit does not know them."""

import math

import pytest
import torch
from clt_training_ideas.coverage import gini
from clt_training_ideas.inverse_sqrt import InverseSqrt, InverseSqrtConfig
from clt_training_ideas.lion_step import Lion


def test_lion_moves_by_the_sign_of_its_momentum_and_the_gradient() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([{"params": [p]}], {"lr": 0.1, "beta1": 0.9, "beta2": 0.5, "weight_decay": 0.2})
    x, m = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([3.0, -1.0], [-1.0, -1.0], [-40.0, 2.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
        for i, g in enumerate(gradient):
            x[i] -= 0.1 * (math.copysign(1, 0.9 * m[i] + 0.1 * g) + 0.2 * x[i])
            m[i] = 0.5 * m[i] + 0.5 * g
    assert p.tolist() == pytest.approx(x)


def test_the_rate_rises_to_its_peak_then_falls_with_the_root_of_the_step() -> None:
    schedule = InverseSqrt(InverseSqrtConfig(warmup_steps=4), None)
    numbers = [schedule(step, 16, 2.0) for step in (0, 3, 15, 40)]
    assert numbers == pytest.approx([0.5, 2.0, 1.0, 1.0])


def test_the_gini_coefficient_is_the_mean_difference_over_twice_the_mean() -> None:
    x = torch.tensor([0.5, 0.1, 0.4, 0.0])
    differences = (x[:, None] - x).abs().mean()
    assert float(gini(x)) == pytest.approx(float(differences / (2 * x.mean())))
    assert float(gini(torch.ones(5))) == pytest.approx(0)
