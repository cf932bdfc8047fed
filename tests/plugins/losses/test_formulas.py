"""The formulas of the losses, against loops over single numbers in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import Affine, Batch, Features, Forward, Loss, Pairs
from tests.support.helpers import parts

B, L, D, F = 4, 3, 6, 10
DEAD_AFTER = 64
CELLS = list(itertools.product(range(B), range(L), range(D)))
FEATURES = list(itertools.product(range(B), range(L), range(F)))


def built(name: str, **settings: Any) -> Loss:
    made = parts(losses=[{"name": name, **settings}], train={"dead_after_tokens": DEAD_AFTER})
    return made.losses[0]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_forward(**changes: Any) -> Forward:
    """One forward pass of random numbers; a third of the features is active, every fourth one is dead."""
    idle = torch.zeros(L, F, dtype=torch.int64)
    idle[:, ::4] = DEAD_AFTER
    idle[:, 1::4] = DEAD_AFTER - 1
    norms = draw(L, F, seed=6).abs()
    forward = Forward(
        batch=Batch(draw(B, L, D, seed=0), draw(B, L, D, seed=1)),
        inputs=draw(B, L, D, seed=2),
        targets=draw(B, L, D, seed=3),
        features=Features((draw(B, L, F, seed=4) - 0.5).relu()),
        reconstruction=draw(B, L, D, seed=5),
        units=Affine(draw(L, D, seed=11), draw(L, D, seed=7).exp()),
        variance=draw(L, seed=8).exp(),
        norms=lambda: norms,
        idle_tokens=idle,
        decode=decode,
        sum_features=lambda x: x,
        extra=None,
        pre=draw(B, L, F, seed=9),
        progress=0.4,
        step=40,
        steps=100,
        steps_done=40,
    )
    return attrs.evolve(forward, **changes)


DECODER = draw(L * F, L, D, seed=10)


def decode(features: Features) -> Tensor:
    """A decoder of this test: feature n adds its value times DECODER[n]."""
    out = torch.zeros(B, L, D, dtype=torch.float64)
    assert features.pairs is not None
    for value, b, n in zip(features.values, features.pairs.token, features.pairs.feature, strict=True):
        out[b] = out[b] + value * DECODER[n]
    return out


def same(computed: Tensor, expected: float) -> None:
    assert float(computed.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("scale", ["raw", "variance"])
def test_mse_is_the_sum_over_layers_of_the_mean_over_tokens_and_dimensions(scale: str) -> None:
    forward = make_forward()
    reconstruction = forward.reconstruction.clone().requires_grad_()
    (term,) = built("mse", scale=scale, weight=0.7)(attrs.evolve(forward, reconstruction=reconstruction)).values()
    expected, gradient = 0.0, torch.zeros(B, L, D, dtype=torch.float64)
    for b, s, d in CELLS:
        unit = float(forward.units.scale[s, d])
        divisor = B * D * (float(forward.variance[s]) if scale == "variance" else 1.0)
        error = (float(forward.reconstruction[b, s, d]) - float(forward.targets[b, s, d])) * unit
        expected += 0.7 * error**2 / divisor
        gradient[b, s, d] = 0.7 * 2 * error * unit / divisor
    same(term, expected)
    term.backward()
    torch.testing.assert_close(reconstruction.grad, gradient, rtol=1e-12, atol=0)


CONSTANT = {"name": "constant", "warmup_steps": 0}
DELAYED = {"name": "ramp", "delay": 0.25}
SCHEDULES = [
    (CONSTANT, 0, 1.0),
    (CONSTANT, 90, 1.0),
    ("ramp", 0, 0.0),
    ("ramp", 40, 0.4),
    ("ramp", 100, 1.0),
    (DELAYED, 20, 0.0),
    (DELAYED, 25, 0.0),
    (DELAYED, 40, 0.2),
    (DELAYED, 100, 1.0),
]
"""Schedule, step of 100, share of λ: (0.4 - 0.25) / (1 - 0.25) is 0.2."""


@pytest.mark.parametrize("schedule, step, share", SCHEDULES)
def test_tanh_sparsity_is_a_sum_over_features_and_a_mean_over_tokens(schedule, step, share) -> None:
    forward = make_forward(step=step)
    acts = forward.features.values.clone().requires_grad_()
    loss = built("tanh_sparsity", weight=0.3, c=1.7, weight_schedule=schedule)
    (term,) = loss(attrs.evolve(forward, features=Features(acts))).values()
    expected, gradient = 0.0, torch.zeros(B, L, F, dtype=torch.float64)
    for b, s, f in FEATURES:
        factor = 1.7 * float(forward.norms()[s, f])
        tanh = math.tanh(factor * float(forward.features.values[b, s, f]))
        expected += share * 0.3 * tanh / B
        # What is not active costs nothing, and stays where it is.
        if tanh > 0:
            gradient[b, s, f] = share * 0.3 * factor * (1 - tanh**2) / B
    same(term, expected)
    term.backward()
    torch.testing.assert_close(acts.grad, gradient, rtol=1e-12, atol=1e-15)


def test_tanh_sparsity_of_pairs_is_that_of_the_dense_features() -> None:
    forward = make_forward()
    acts = forward.features.values
    pairs = Pairs.from_mask(acts > 0)
    sparse = attrs.evolve(forward, features=Features(acts.flatten(1)[pairs.token, pairs.feature], pairs))
    loss = built("tanh_sparsity")
    same(loss(sparse)["tanh_sparsity"], float(loss(forward)["tanh_sparsity"]))


@pytest.mark.parametrize("scope", ["dead", "all"])
def test_preactivation_is_the_mean_of_what_is_below_zero(scope: str) -> None:
    forward = make_forward()
    (term,) = built("preactivation", weight=0.2, scope=scope)(forward).values()
    expected = 0.0
    for b, s, f in FEATURES:
        if scope == "all" or int(forward.idle_tokens[s, f]) >= DEAD_AFTER:
            expected += 0.2 * max(0.0, -float(forward.pre[b, s, f])) / (B * L * F)
    same(term, expected)


def test_auxk_selects_the_best_dead_features_of_each_token_and_divides_by_the_power_of_the_residual() -> None:
    k, forward = 4, make_forward()
    assert forward.pre is not None
    loss = built("auxk", weight=0.6, k=k, pull=0.05)
    selection = loss.selection(B, forward.idle_tokens)
    assert selection is not None
    for layer in range(L):
        selection.see(layer, forward.pre[:, layer])
    pairs, values = selection.finish()
    terms = loss(attrs.evolve(forward, extra=Features(values, pairs)))

    dead = [(s, f) for s in range(L) for f in range(F) if int(forward.idle_tokens[s, f]) >= DEAD_AFTER]
    assert k < len(dead) < L * F
    written = torch.zeros(B, L, D, dtype=torch.float64)
    pulled, chosen = 0.0, set()
    for b in range(B):
        best = sorted(dead, key=lambda place: -float(forward.pre[b, *place]))[:k]
        for s, f in best:
            chosen.add((b, s * F + f))
            pulled += float(forward.pre[b, s, f])
            for t, d in itertools.product(range(L), range(D)):
                written[b, t, d] += max(0.0, float(forward.pre[b, s, f])) * DECODER[s * F + f, t, d]
    assert set(zip(pairs.token.tolist(), pairs.feature.tolist(), strict=True)) == chosen
    expected = 0.0
    for s in range(L):
        error = power = 0.0
        for b, d in itertools.product(range(B), range(D)):
            residual = float(forward.targets[b, s, d]) - float(forward.reconstruction[b, s, d])
            error += (float(written[b, s, d]) - residual) ** 2 / (B * D)
            power += residual**2 / (B * D)
        expected += 0.6 * error / power / L
    same(terms["auxk"], expected)
    same(terms["auxk_pull"], -0.05 * pulled / (B * k))


def test_auxk_sends_no_gradient_into_the_residual_and_one_to_dead_pre_activations() -> None:
    forward = make_forward()
    forward.reconstruction.requires_grad_()
    values = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(torch.tensor([0, 2]), torch.tensor([4, 8]), B, L, F)
    terms = built("auxk", k=2, pull=0.05)(attrs.evolve(forward, extra=Features(values, pairs)))
    terms["auxk_pull"].backward(retain_graph=True)
    torch.testing.assert_close(values.grad, torch.full((2,), -0.05 / (B * 2), dtype=torch.float64))
    values.grad = None
    terms["auxk"].backward()
    assert forward.reconstruction.grad is None
    assert values.grad is not None and values.grad[0] != 0 and values.grad[1] == 0, "a ReLU stops the negative one"


@pytest.mark.parametrize("empty", [0, 1])
def test_auxk_is_zero_without_dead_features(empty: int) -> None:
    """On a CPU there is no selection then; on a GPU all pairs of it are empty."""
    forward = make_forward()
    loss = built("auxk")
    assert loss.selection(B, torch.zeros(L, F, dtype=torch.int64)) is None
    nothing = Features(
        torch.full((B,), -torch.inf, dtype=torch.float64),
        Pairs(torch.arange(B), torch.zeros(B, dtype=torch.int64), B, L, F),
    )
    terms = loss(attrs.evolve(forward, extra=nothing if empty else None))
    assert {name: float(value) for name, value in terms.items()} == {"auxk": 0.0, "auxk_pull": 0.0}
