"""Everything above a bound, where the number of pairs cannot be read: forced on a CPU, against what reads it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_kernels.reference import TorchKernels
from clt_plugins import Above, Single, run
from clt_plugins.data.features import Pairs
from clt_plugins.files.folders import read_tensors
from clt_plugins.model.select.above import LEAST, Capacity
from clt_plugins.training.objective import objective
from tests.support.helpers import ACTIVATIONS, parts, random_batch, stir, tables

FIXED = TorchKernels(fixed=True)


def blocks(tokens: int = 6, n_layers: int = 3, n_features: int = 8) -> torch.Tensor:
    pre = torch.randn(tokens, n_layers, n_features, generator=torch.Generator().manual_seed(0))
    pre[2, 1, 3], pre[4, 0, 0], pre[0, 2, 7] = torch.nan, torch.inf, -torch.inf
    return pre


def kept(pre: torch.Tensor, bound: Any, places: int | None) -> tuple[Pairs, torch.Tensor, int]:
    above, passed = Above(bound, *pre.shape), [torch.tensor(-1)]
    if places is not None:
        above.limit(FIXED, places, passed.append)
    for layer in range(pre.shape[1]):
        above.see(layer, pre[:, layer].clone())
    return *above.finish(), int(passed[-1])


@pytest.mark.parametrize("bound", [0.5, torch.linspace(-1, 1, 24).view(3, 8)], ids=["number", "thresholds"])
def test_with_room_for_all_the_pairs_are_those_of_free_sizes(bound):
    pre = blocks()
    pairs, values, _ = kept(pre, bound, None)
    for places in (len(values), len(values) + 7, pre.numel()):
        fixed, also, passed = kept(pre, bound, places)
        assert fixed.count is not None and int(fixed.count) == passed == len(values)
        assert len(also) == places, "the size says nothing of the numbers"
        assert torch.equal(fixed.token[: len(values)], pairs.token)
        assert torch.equal(fixed.feature[: len(values)], pairs.feature)
        torch.testing.assert_close(also[: len(values)], values, rtol=0, atol=0, equal_nan=True)
        assert (also[len(values) :] == -torch.inf).all()


def test_without_places_those_farthest_above_their_bound_are_kept_and_all_are_counted():
    pre, bound = blocks(), torch.linspace(-1, 1, 24).view(3, 8)
    margin = (pre - bound).nan_to_num(nan=torch.inf)
    wanted = {tuple(place) for place in (margin > margin.flatten().sort(descending=True).values[10]).nonzero().tolist()}
    pairs, _, passed = kept(pre, bound, 10)
    layer, feature = pairs.feature // 8, pairs.feature % 8
    assert set(zip(pairs.token.tolist(), layer.tolist(), feature.tolist(), strict=True)) == wanted
    assert passed == int((margin > 0).sum()) > 10


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_a_step_with_fixed_sizes_has_the_losses_and_gradients_of_free_sizes(activation):
    losses = [{"name": "mse"}, {"name": "tanh_sparsity"}]
    results = []
    for fixed in (False, True):
        built = parts(
            activation=ACTIVATIONS[activation], losses=losses, transcoder={"path": "sparse"}, kernels={"name": "torch"}
        )
        stir(built.transcoder)
        built.context.kernels.fixed = fixed
        transcoder = built.transcoder.train()
        idle = torch.zeros(transcoder.b_enc.shape, dtype=torch.int64)
        outcome = objective(
            transcoder, built.losses, random_batch(16, transcoder.n_layers, transcoder.d_model), idle, 0.5
        )
        outcome.total.backward()
        assert outcome.features.pairs is not None
        assert (outcome.features.pairs.count is not None) == fixed
        results.append([outcome.total, outcome.features.counts(), *(p.grad for p in transcoder.parameters())])
    for free, fixed_size in zip(*results, strict=True):
        torch.testing.assert_close(free, fixed_size, rtol=1e-5, atol=1e-6)  # sums in another order
    transcoder.eval()
    with torch.no_grad():
        pairs = transcoder.encode(random_batch(16, transcoder.n_layers, transcoder.d_model).inputs).pairs
    assert pairs is not None and pairs.count is None, "outside of training the number may be read"


def test_room_grows_when_pairs_are_left_out_and_shrinks_when_most_stay_empty(caplog):
    capacity = Capacity(0.1)

    def step(passing: int) -> int:
        above = Above(0.5, 100, 2, 1000)
        capacity.limit(above, FIXED)
        pre = torch.zeros(100 * 2 * 1000)
        pre[:passing] = 1
        for layer in range(2):
            above.see(layer, pre.view(100, 2, 1000)[:, layer])
        pairs, _ = above.finish()
        assert pairs.count is not None
        return int(pairs.count)

    assert step(15_000) == 15_000
    assert step(23_000) == 20_000, "a tenth of all"
    assert step(22_000) == 20_000
    with caplog.at_level(logging.WARNING):
        assert capacity.read(Single()) == 5_000
    assert "5000 pairs above their threshold had no place" in caplog.text
    assert step(30_000) == 30_000, "half as much again as the fullest step had"
    assert capacity.read(Single()) == 0
    share = capacity.share
    assert step(25_000) == 25_000 and capacity.read(Single()) == 0
    assert capacity.share == share, "sizes stay while they fit"
    assert step(10) == 10 and capacity.read(Single()) == 0
    assert capacity.places == LEAST


def test_a_run_that_leaves_pairs_out_resumes_bit_for_bit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("clt_plugins.model.select.above.LEAST", 1)
    monkeypatch.setattr("clt_plugins.model.transcoder.Capacity", lambda share: Capacity(0.2))
    changed: dict[str, Any] = {
        "activation": {"name": "relu"},
        "transcoder": {"path": "sparse"},
        "kernels": {"name": "torch"},
        "train": {"steps": 12, "log_every": 5, "checkpoint_every": 3},
    }
    monkeypatch.setattr(TorchKernels, "__init__", lambda self, *, fixed=False: setattr(self, "fixed", True))
    run(tables(**changed), out=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    lost = [line["train/pairs_left_out"] for line in lines if "train/pairs_left_out" in line]
    assert lost[0] > 0 and lost[-1] == 0
    for step in (3, 6, 9):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        run(tables(**changed), out=folder, resume=f"step_{step:06}")
        for file in ("transcoder", "training"):
            one, two = (
                read_tensors(each / f"checkpoints/step_000012/{file}.safetensors")
                for each in (tmp_path / "whole", folder)
            )
            assert all(torch.equal(value, two[name]) for name, value in one.items())
        states = [
            json.loads((each / "checkpoints/step_000012/training.json").read_text())
            for each in (tmp_path / "whole", folder)
        ]
        assert states[0]["capacity"] == states[1]["capacity"]
        assert states[0]["capacity"] is not None
