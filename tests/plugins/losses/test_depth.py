"""The loss `depth` against loops over single features, and what it estimates."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import Features, Pairs, generator
from clt_plugins.errors import Faults
from clt_plugins.training.objective import objective
from tests.plugins.losses.test_formulas import DECODER, B, D, F, L, built, decode, make_forward, same
from tests.support.helpers import TYINGS, parts, random_batch, recipe, stir

BITS = 2**64 - 1


def mixed(number: int, seed: int) -> int:
    """SplitMix64 in Python's integers, the lower 62 bits."""
    x = (number * 0x9E3779B97F4A7C15 + seed) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return (x ^ (x >> 31)) & (2**62 - 1)


def drawn(values: Tensor, step: int, draw: int) -> list[tuple[int, int, int] | None]:
    """The (layer, feature, number of active features) that each token of [B, L, F] draws."""
    seed = generator(0, "depth", step, draw).initial_seed()
    tokens, layers, features = values.shape
    out: list[tuple[int, int, int] | None] = []
    for b in range(tokens):
        active = [(s, f) for s in range(layers) for f in range(features) if values[b, s, f] > 0]
        key = {(s, f): (mixed(b, seed) + mixed(-1 - s * features - f, seed)) % 2**62 for s, f in active}
        out.append((*max(active, key=lambda place: key[place]), len(active)) if active else None)
    return out


def test_depth_and_its_gradients_are_those_of_the_features_drawn() -> None:
    """By hand: with y = a·w, ∂‖y‖/∂a = ‖w‖ and ∂‖y‖/∂w = a·w/‖w‖."""
    forward, power = make_forward(), 1.5
    values = forward.features.values.clone()
    values[2] = 0  # a token without active features
    pairs = Pairs.from_mask(values > 0)
    acts = values.flatten(1)[pairs.token, pairs.feature].requires_grad_()
    decoder = torch.stack([torch.stack([DECODER[n, t] * (t >= n // F) for t in range(L)]) for n in range(L * F)])
    decoder.requires_grad_()

    def written(features: Features) -> Tensor:
        assert features.pairs is not None
        return features.values[:, None, None] * decoder[features.pairs.feature]

    loss = built("depth", weight=0.3, power=power, draws=2)
    (term,) = loss(attrs.evolve(forward, features=Features(acts, pairs), decode=written)).values()
    term.backward()
    expected, by_value, by_row = 0.0, torch.zeros(B, L * F), torch.zeros(L * F, L, D)
    by_value, by_row = by_value.double(), by_row.double()
    for draw in range(2):
        for b, one in enumerate(drawn(values, forward.step, draw)):
            assert (one is None) == (b == 2)
            if one is None:
                continue
            s, f, count = one
            for t in range(s + 1, L):
                price = 0.3 * count * (t - s) ** power / (B * 2)
                row, a = DECODER[s * F + f, t], float(values[b, s, f])
                norm = sum(float(x) ** 2 for x in row) ** 0.5
                expected += price * a * norm
                by_value[b, s * F + f] += price * norm
                by_row[s * F + f, t] += price * a * row / norm
    same(term, expected)
    assert expected > 0
    torch.testing.assert_close(acts.grad, by_value[pairs.token, pairs.feature], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(decoder.grad, by_row, rtol=1e-12, atol=1e-15)


def test_draws_estimate_the_sum_over_all_active_features() -> None:
    forward, draws = make_forward(), 1000
    values = forward.features.values
    loss = built("depth", weight=0.3, power=1.0, draws=draws)
    exact, squares = 0.0, 0.0
    costs: dict[int, list[float]] = {b: [] for b in range(B)}
    for b, s, f in itertools.product(range(B), range(L), range(F)):
        if float(values[b, s, f]) > 0:
            norms = [(t - s) * float(DECODER[s * F + f, t].norm()) for t in range(s + 1, L)]
            costs[b].append(float(values[b, s, f]) * sum(norms))
    for of_token in costs.values():
        exact += 0.3 * sum(of_token) / B
        mean = sum(of_token) / len(of_token)
        variance = sum((x - mean) ** 2 for x in of_token) / len(of_token)
        squares += (0.3 * len(of_token) / B) ** 2 * variance / draws
    # One decoding for all draws of a token is as good here, and faster.
    estimate = float(loss(attrs.evolve(forward, decode=of_single_pairs))["depth"])
    assert abs(estimate - exact) < 4 * squares**0.5 < 0.1 * exact, (estimate, exact)


def of_single_pairs(features: Features) -> Tensor:
    assert features.pairs is not None
    return features.values[:, None, None] * DECODER[features.pairs.feature]


def written_by(tying: Any, name: str, s: int, f: int, t: int, a: Tensor) -> Tensor:
    """What a feature of value a writes to a layer, from the parameters as they are defined."""
    if name == "untied":
        return a * tying.views()[f"W_dec.{s:02}"][1](tying.weight)[f, t - s]
    if tying.offset is not None:
        a = a + tying.offset[t, f]
    if tying.scale is not None:
        a = a * tying.scale[t, f]
    return a * tying.weight[s if name == "per_source" else t, f]


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("tying", [name for name in TYINGS if name != "per_layer"])
def test_depth_of_every_decoder_sparse_and_dense(tying: str, path: str) -> None:
    made = parts(
        losses=[{"name": "depth", "weight": 0.7}],
        tying=TYINGS[tying],
        activation={"name": "relu"},
        transcoder={"dtype": "float64", "path": path},
    )
    transcoder, batch = made.transcoder, random_batch(5, L, D, torch.float64)
    stir(transcoder)
    outcome = objective(transcoder, made.losses, batch, torch.zeros(transcoder.shape, dtype=torch.int64), 0.0)
    outcome.total.backward()
    gradients = {name: p.grad for name, p in transcoder.named_parameters()}
    transcoder.zero_grad()

    x = transcoder.normaliser.inputs(batch.inputs)
    acts = (torch.einsum("bld,lfd->blf", x, transcoder.W_enc) + transcoder.b_enc).relu()
    expected = x.new_zeros(())
    for b, one in enumerate(drawn(acts, 0, 0)):
        if one is not None:
            s, f, count = one
            for t in range(s + 1, L):
                written = written_by(transcoder.tying, TYINGS[tying]["name"], s, f, t, acts[b, s, f])
                expected = expected + 0.7 * count / 5 * written.square().sum().sqrt()
    same(outcome.total, float(expected))
    expected.backward()
    for name, p in transcoder.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        found = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_empty_places_are_never_drawn() -> None:
    """On a GPU they stand at the end, with the last token and feature and a value of 0."""
    forward = attrs.evolve(make_forward(), decode=decode)
    values = forward.features.values
    pairs = Pairs.from_mask(values > 0)
    acts, pad = values.flatten(1)[pairs.token, pairs.feature], torch.nn.functional.pad
    token, feature = pad(pairs.token, (0, 3), value=B - 1), pad(pairs.feature, (0, 3), value=L * F - 1)
    padded = Features(pad(acts, (0, 3)), Pairs(token, feature, B, L, F, torch.tensor(len(acts))))
    loss = built("depth")
    narrow = float(loss(attrs.evolve(forward, features=Features(acts, pairs)))["depth"])
    assert narrow > 0
    same(loss(attrs.evolve(forward, features=padded))["depth"], narrow)


def late_and_own(weight: float) -> tuple[float, float]:
    """Norms of a trained decoder to later layers and to the own one."""
    made = parts(losses=["mse", {"name": "depth", "weight": weight}], train={"lr": 1e-2})
    transcoder = made.transcoder.train()
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=1e-2)
    idle = torch.zeros(transcoder.shape, dtype=torch.int64)
    for step in range(60):
        optimizer.zero_grad()
        batch = random_batch(32, L, D, seed=step)
        objective(transcoder, made.losses, batch, idle, step / 60).total.backward()
        optimizer.step()
    rows = [transcoder.tying.expand(s).norm(dim=2) for s in range(L)]
    return sum(float(x[:, 1:].sum()) for x in rows), sum(float(x[:, 0].sum()) for x in rows)


def test_training_with_depth_takes_writes_to_later_layers_away() -> None:
    (late, own), (late_before, own_before) = late_and_own(0.3), late_and_own(0.0)
    assert late < 0.6 * late_before
    assert own > 0.9 * own_before


def test_depth_is_refused_where_nothing_is_written_to_later_layers() -> None:
    with pytest.raises(Faults, match=r"losses\[0\]: depth penalises writes to later layers, and 'per_layer' has none"):
        recipe(losses=[{"name": "depth"}], tying={"name": "per_layer"})


def test_draws_go_on_after_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `schedule_steps` were done, every further step drew the same: some features were hardly penalised."""
    made = parts(losses=["depth"], train={"steps": 12, "schedule_steps": 4})
    seeds = []
    real = type(made.losses[0])._best
    monkeypatch.setattr(
        type(made.losses[0]),
        "_best",
        lambda self, features, step, draw: seeds.append(step) or real(self, features, step, draw),
    )
    idle = torch.zeros(made.transcoder.shape, dtype=torch.int64)
    for step in range(8):
        made.transcoder.step = step
        objective(made.transcoder.train(), made.losses, random_batch(8, L, D), idle, min(1.0, step / 4))
    assert seeds == list(range(8))
