"""Scores on held-out tokens against loops over single numbers in float64; and layers that have none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from clt_plugins import Batch, Features
from clt_plugins.model.scores import Scores, ScoreSums

B, L, D, F = (5, 1, 9), 3, 4, 7
"""Tokens in each of three batches."""
TOKENS = sum(B)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_of(targets: Tensor, reconstruction: Tensor, acts: Tensor) -> Scores:
    sums = ScoreSums(L, D, F)
    for t, r, a in zip(targets.split(B), reconstruction.split(B), acts.split(B), strict=True):
        sums.add(Batch(torch.zeros_like(t), t), r, Features(a))
    return sums.result()


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Targets, a reconstruction that is off by a mean too, and activations of which some features have none."""
    targets = draw(TOKENS, L, D, seed=0) * torch.tensor([1.0, 30.0, 0.01])[:, None] + 5
    reconstruction = targets + 0.3 * targets.std(0) * draw(TOKENS, L, D, seed=1) + 0.1 * targets.std(0)
    acts = (draw(TOKENS, L, F, seed=2) - 0.5).relu()
    acts[:, 1, :3] = 0
    return targets, reconstruction, acts


def test_every_score_by_hand(numbers):
    targets, reconstruction, acts = numbers
    scores = scores_of(*numbers)
    nmse, explained, l0, dead = [], [], [], []
    for s in range(L):
        error = variance = of_error = 0.0
        for d in range(D):
            column = [float(targets[b, s, d]) for b in range(TOKENS)]
            errors = [float(reconstruction[b, s, d]) - column[b] for b in range(TOKENS)]
            mean, mean_error = sum(column) / TOKENS, sum(errors) / TOKENS
            variance += sum((y - mean) ** 2 for y in column) / TOKENS / D
            error += sum(e**2 for e in errors) / TOKENS / D
            of_error += sum((e - mean_error) ** 2 for e in errors) / TOKENS / D
        nmse.append(error / variance)
        explained.append(1 - of_error / variance)
        counts = [sum(float(acts[b, s, f]) > 0 for b in range(TOKENS)) for f in range(F)]
        l0.append(sum(counts) / TOKENS)
        dead.append(sum(count == 0 for count in counts) / F)
        assert scores.density[s].tolist() == pytest.approx([count / TOKENS for count in counts], rel=1e-6)
    assert scores.tokens == TOKENS and scores.undefined == {} and scores.notes() == []
    # The scores of layers are float32.
    assert scores.nmse_by_layer.tolist() == pytest.approx(nmse, rel=1e-6)
    assert scores.explained_variance_by_layer.tolist() == pytest.approx(explained, rel=1e-6)
    assert scores.l0_by_layer.tolist() == pytest.approx(l0, rel=1e-6)
    assert scores.dead_fraction_by_layer.tolist() == pytest.approx(dead, rel=1e-6)
    assert scores.nmse == pytest.approx(sum(nmse) / L, rel=1e-12)
    assert scores.explained_variance == pytest.approx(sum(explained) / L, rel=1e-10)
    assert scores.l0 == pytest.approx(sum(l0), rel=1e-12)
    assert scores.dead_fraction == pytest.approx(sum(dead) / L, rel=1e-12)
    for s, d in itertools.product(range(L), range(D)):
        assert float(scores.target_mean[s, d]) == pytest.approx(float(targets[:, s, d].sum()) / TOKENS, rel=1e-12)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(
    ("where", "told"), [("targets", "held-out targets are numbers"), ("reconstruction", "reconstruction is not finite")]
)
def test_a_layer_with_a_number_that_is_not_finite_has_no_score_and_is_named(numbers, where, told, number):
    """1e30 is one whose NMSE does not fit into float32; as a target it only makes the variance large."""
    plain = scores_of(*numbers)
    (numbers[0] if where == "targets" else numbers[1])[3, 1, 2] = number
    scores = scores_of(*numbers)
    assert scores.nmse_by_layer[[0, 2]].tolist() == plain.nmse_by_layer[[0, 2]].tolist()
    if number == 1e30 and where == "targets":
        assert scores.undefined == {} and float(scores.nmse_by_layer[1]) == pytest.approx(
            TOKENS / (TOKENS - 1), rel=1e-3
        )
        return
    assert scores.nmse_by_layer.isnan().tolist() == [False, True, False]
    assert scores.explained_variance_by_layer.isnan().tolist() == [False, True, False]
    assert scores.nmse == pytest.approx(float(plain.nmse_by_layer[[0, 2]].double().mean()), rel=1e-6)
    (line,) = scores.notes()
    assert line.startswith("layer 1 has no NMSE and is left out of the mean: ") and told in line


def test_constant_targets_have_no_score_and_are_named(numbers):
    numbers[0][:, 2] = 0.1
    scores = scores_of(*numbers)
    assert scores.nmse_by_layer.isnan().tolist() == [False, False, True]
    assert scores.notes() == ["layer 2 has no NMSE and is left out of the mean: its held-out targets are constant"]


def test_without_any_layer_the_mean_is_not_defined_either(numbers):
    numbers[0][:] = 7.0
    scores = scores_of(*numbers)
    assert math.isnan(scores.nmse) and math.isnan(scores.explained_variance) and len(scores.notes()) == L
