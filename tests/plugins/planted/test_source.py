"""Planted activations are those of a residual stream in which the gates compute what the truth says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from clt_planted import PlantedConfig, clt_sources
from clt_plugins import Context, Faults, Refused, Single
from tests.support.helpers import recipe

BOOLEAN = {"hops": 3, "gates": ["and", "copy", "or", "and_not"], "chains": 8, "active": 4.0}


def build(seed: int = 0, tokens: int = 64, rank: int = 0, ranks: int = 1, **config: Any) -> Any:
    (spec,) = clt_sources()
    context = Context(
        recipe=None,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=tokens,
        steps=1,
        parallel=Single(rank, ranks),
    )
    return spec.build(PlantedConfig(**config), context)


def test_each_layer_adds_its_targets_to_the_stream() -> None:
    batch = build(noise=0.3, **BOOLEAN).next()
    assert batch.inputs.shape == batch.targets.shape == (64, 3, 64)
    assert torch.equal(batch.inputs[:, 1:], (batch.inputs + batch.targets)[:, :-1])


@pytest.mark.parametrize("consume", [False, True])
def test_targets_are_what_the_gates_say_token_by_token(consume: bool) -> None:
    source = build(consume=consume, tokens=200, **BOOLEAN)
    truth, batch = source.truth(), source.next()
    amounts = source.amounts(batch)
    assert {feature.gate for feature in truth.features} == {"embedding", "and", "copy", "or", "and_not"}
    for token in range(200):
        stream = {n: float(amounts[token, 0, n]) for n, one in enumerate(truth.features) if one.layer == -1}
        for layer in range(3):
            read = sum((value * truth.directions[n] for n, value in stream.items()), torch.zeros(64))
            torch.testing.assert_close(batch.inputs[token, layer], read, atol=2e-6, rtol=0)
            new = dict(stream)
            for number, feature in enumerate(truth.features):
                if feature.layer != layer:
                    continue
                a, *b = [stream.get(parent, 0.0) > 0 for parent in feature.parents]
                on = {"copy": [a], "and": [a, *b], "or": [a or b[:1] == [True]], "and_not": [a, b != [True]]}[
                    feature.gate
                ]
                if all(on):
                    new[number] = 1.0
                    for parent in feature.parents if consume else ():
                        new.pop(parent, None)
            written = sum((value * truth.directions[n] for n, value in new.items()), torch.zeros(64)) - read
            torch.testing.assert_close(batch.targets[token, layer], written, atol=4e-6, rtol=0)
            stream = new


def test_a_copy_passes_its_value_on() -> None:
    source = build(chains=20)
    values = source.truth().values(source.amounts(source.next()))
    for parent, child in source.truth().edges():
        assert torch.equal(values[:, parent], values[:, child])
    active = values[values > 0]
    assert active.min() >= 0.5
    assert active.max() <= 1.5
    assert active.unique().numel() > 10


def test_chains_go_through_neighbouring_layers_and_begin_everywhere() -> None:
    truth = build(layers=4, hops=2, chains=9, gates=["and"]).truth()
    starts = set()
    for chain in truth.chains():
        parent, child = truth.features[chain.parent], truth.features[chain.child]
        assert child.layer == parent.layer + 1
        assert chain.before == set(parent.parents)
        starts.add(parent.layer)
    assert len(truth.chains()) == 9
    assert starts == {0, 1, 2}
    assert len(truth.computed()) == 18


def test_directions_are_orthogonal_where_they_fit_and_norms_are_log_uniform() -> None:
    directions = build(chains=32, norms=100.0).truth().directions
    assert directions.shape == (64, 64)
    norms = directions.norm(dim=1)
    unit = directions / norms[:, None]
    torch.testing.assert_close(unit @ unit.T, torch.eye(64), atol=1e-5, rtol=0)
    assert 0.1 <= norms.min() < 0.14
    assert 7 < norms.max() <= 10
    # Uniform in log10 from -1 to 1: the mean of 64 has a standard error of 0.07.
    assert abs(float(norms.log10().mean())) < 0.22
    crowded = build(chains=40).truth().directions
    torch.testing.assert_close(crowded.norm(dim=1), torch.ones(80))


@pytest.mark.parametrize("activity", ["independent", "hierarchical", "correlated"])
def test_as_many_chains_are_active_as_asked(activity: str) -> None:
    source = build(tokens=20_000, activity=activity, chains=30, active=3.0)
    active = (source.amounts(source.next())[:, 0] > 0).sum(1).double()
    # Standard errors: 0.012 for independent chains, up to 0.02 for correlated ones.
    assert abs(float(active.mean()) - 3) < 0.08


def test_a_child_is_active_only_with_its_parent_and_alone_among_its_siblings() -> None:
    source = build(tokens=5000, activity="hierarchical", chains=10, group=4)
    truth = source.truth()
    on = truth.values(source.amounts(source.next())) > 0
    assert len(truth.families) == 7  # 3, 3 and 1
    children: dict[int, list[int]] = {}
    for parent, child in truth.families:
        assert truth.features[parent].layer == truth.features[child].layer
        assert not bool((on[:, child] & ~on[:, parent]).any())
        children.setdefault(parent, []).append(child)
    for parent, own in children.items():
        assert int(on[:, own].sum(1).max()) == 1
        # A child, or none, equally often.
        share = float(on[:, own].any(1).sum() / on[:, parent].sum())
        assert abs(share - len(own) / (len(own) + 1)) < 0.08


def test_chains_of_a_group_are_correlated_and_others_are_not() -> None:
    source = build(tokens=20_000, activity="correlated", chains=8, group=4, active=1.6, correlation=0.6)
    on = (source.amounts(source.next())[:, 0, ::2] > 0).double()
    correlation = torch.corrcoef(on.T)
    same = torch.arange(8)[:, None] // 4 == torch.arange(8) // 4
    # Of two normal variables of correlation 0.6, cut at their upper fifth: 0.35.
    inside = correlation[same & ~torch.eye(8, dtype=torch.bool)]
    assert inside.min() > 0.3
    assert inside.max() < 0.4
    assert correlation[~same].abs().max() < 0.03


def test_amounts_of_any_rows_of_any_batches() -> None:
    source = build(noise=0.1, **BOOLEAN)
    first, second = source.next(), source.next()
    (held_out,) = source.held_out(40)
    whole = [source.amounts(batch) for batch in (first, second, held_out)]
    rows = torch.tensor([3, 60, 7])
    assert torch.equal(source.amounts(second.rows(rows)), whole[1][rows])
    assert len({tuple(x[:40, 0].flatten().tolist()) for x in whole}) == 3
    exact = build(**BOOLEAN)
    torch.testing.assert_close(
        exact.next().inputs, exact.amounts(first)[:, :-1] @ exact.truth().directions, atol=2e-6, rtol=0
    )


def test_a_state_continues_bit_for_bit_and_ranks_share_the_batches_of_one_process() -> None:
    source = build(noise=0.1, tokens=60)
    source.next()
    state = json.loads(json.dumps(source.state()))
    ranks = [build(noise=0.1, tokens=60, rank=rank, ranks=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(2):
        whole, parts = source.next(), [rank.next() for rank in ranks]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)
    with pytest.raises(Refused, match="data"):
        build(seed=1, tokens=60).load_state(state)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"layers": 2, "hops": 3}, "source.hops: 3 hops need as many layers, and there are 2"),
        ({"chains": 4, "active": 5.0}, "source.active: 5 chains cannot be active: 4 is the most"),
        (
            {"chains": 4, "active": 2.0, "activity": "hierarchical"},
            "source.active: 2 chains cannot be active: 1.75 is the most",
        ),
    ],
)
def test_settings_that_cannot_be_are_faults_of_the_recipe(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(Faults) as raised:
        recipe(source={"name": "planted", **settings})
    assert [f"{one.path}: {one.text}" for one in raised.value.faults] == [fault]
