"""Synthetic batches are the sums of the features that the source tells."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from clt_plugins import Context, Faults, Refused, Single
from clt_synthetic import SyntheticConfig, clt_sources
from tests.support.helpers import recipe


def build(seed: int = 0, tokens: int = 64, rank: int = 0, ranks: int = 1, **config: Any) -> Any:
    (spec,) = clt_sources()
    settings: dict[str, Any] = {"layers": 3, "d_model": 16, "features": 20, "active": 3.0} | config
    context = Context(
        recipe=None,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=tokens,
        steps=1,
        parallel=Single(rank, ranks),
    )
    return spec.build(SyntheticConfig(**settings), context)


def test_batches_are_sums_of_the_active_features_directions() -> None:
    source = build()
    source.next()
    batch, active, truth = source.next(), source.active("train", 1), source.truth()
    for token in range(4):
        inputs, targets = torch.zeros(3, 16), torch.zeros(3, 16)
        for layer, feature in (active[token] > 0).nonzero().tolist():
            inputs[layer] += active[token, layer, feature] * truth.encoders[layer, feature]
            for target in range(layer, 3):
                targets[target] += active[token, layer, feature] * truth.decoders[layer, target, feature]
        # Sums of a few float32 numbers near 1, in another order.
        torch.testing.assert_close(batch.inputs[token], inputs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(batch.targets[token], targets, atol=1e-6, rtol=1e-5)


def test_features_are_as_sparse_as_asked_and_write_no_earlier_layer() -> None:
    source = build(tokens=20_000)
    counts = (source.active("train", 0) > 0).sum((1, 2)).double()
    # Poisson-like with mean 3: the mean of 20,000 tokens has a standard error of 0.012.
    assert abs(float(counts.mean()) - 3) < 0.06
    truth = source.truth()
    norms = truth.decoders.norm(dim=-1)
    for layer in range(3):
        assert torch.equal(norms[layer, :layer], torch.zeros(layer, 20))
        torch.testing.assert_close(norms[layer, layer:], torch.ones(3 - layer, 20))
    torch.testing.assert_close(truth.encoders.norm(dim=-1), torch.ones(3, 20))


def test_noise_has_the_asked_deviation() -> None:
    clean, noisy = build(tokens=2000).next(), build(tokens=2000, noise=0.5).next()
    # 96,000 numbers: a standard error of 0.0011.
    assert abs(float((noisy.inputs - clean.inputs).std()) - 0.5) < 0.006
    assert abs(float((noisy.targets - clean.targets).std()) - 0.5) < 0.006


def test_a_state_continues_bit_for_bit() -> None:
    source = build(noise=0.1)
    for _ in range(5):
        source.next()
    state = json.loads(json.dumps(source.state()))
    resumed = build(noise=0.1)
    resumed.load_state(state)
    for _ in range(3):
        one, two = source.next(), resumed.next()
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.targets, two.targets)


def test_data_ranks_share_the_batches_of_one_process() -> None:
    whole = build(tokens=60)
    ranks = [build(tokens=60, rank=rank, ranks=3) for rank in range(3)]
    for _ in range(2):
        assert torch.equal(torch.cat([rank.next().inputs for rank in ranks]), whole.next().inputs)
    with pytest.raises(Refused, match=r"^train\.batch_tokens: 60 cannot be divided among 7 data ranks$"):
        build(tokens=60, ranks=7)


def test_held_out_batches_repeat_and_are_no_training_batches() -> None:
    source = build()
    first = torch.cat([batch.inputs for batch in source.held_out(100)])
    trained = torch.cat([source.next().inputs for _ in range(10)])
    assert first.shape[0] == 100
    assert torch.equal(first, torch.cat([batch.inputs for batch in source.held_out(100)]))
    present = {tuple(row) for row in trained.flatten(1).tolist() if any(row)}
    assert not present & {tuple(row) for row in first.flatten(1).tolist()}


def test_more_active_features_than_there_are_is_a_fault_of_the_recipe() -> None:
    with pytest.raises(Faults) as raised:
        recipe(source={"name": "synthetic", "layers": 3, "features": 4, "active": 13.0})
    (fault,) = raised.value.faults
    assert fault.path == "source.active"
    assert fault.text == "13 features cannot be active: all layers have 12"
    assert recipe(source={"name": "synthetic", "layers": 3, "features": 4, "active": 12.0})


def test_seeds_make_other_features() -> None:
    assert not torch.equal(build(seed=0).truth().encoders, build(seed=1).truth().encoders)
