"""Selection on the CPU over blocks that are long enough to be sampled, compared in groups and cut: against a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clt_kernels.cpu import pools, select
from clt_kernels.cpu.select import NumbaSelect
from clt_plugins.testing.selection import assert_kept, expected

TOKENS, LAYERS, FEATURES = 96, 3, 1024


def normal() -> Tensor:
    return torch.randn(LAYERS, TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))


def sampled_places(block: Tensor) -> Tensor:
    """Where the first block is looked at for a first bound."""
    return (torch.arange(pools.SAMPLE, dtype=torch.float64) * 0.6180339887498949 % 1 * block.numel()).long()


def unlike_its_sample() -> Tensor:
    """The sample has all the large numbers of the first block, so nearly nothing beats its bound."""
    pre = normal()
    first = pre[0].view(-1)
    first[sampled_places(first)] += 100
    return pre


def coarse() -> Tensor:
    """Some tens of different numbers, so that no bound cuts near k."""
    return (normal() * 4).round()


def rising() -> Tensor:
    """Every number beats all before it."""
    return torch.arange(LAYERS * TOKENS * FEATURES, dtype=torch.float32).view(LAYERS, TOKENS, FEATURES)


def extremes() -> Tensor:
    """NaN, infinities, zeros of both signs and the smallest numbers, among few others."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, -torch.nan])
    pre = -normal().abs()
    place = torch.randint(0, 40, pre.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(place < 8, special[place.clamp_max(7)], pre)


@pytest.mark.parametrize("make", [normal, unlike_its_sample, coarse, rising, extremes, lambda: -rising()])
@pytest.mark.parametrize("per", ["batch", "token"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_of_long_blocks(make: Any, per: Any, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "PER_THREAD", 2**14)
    pre = make()
    scale = torch.rand(FEATURES, generator=torch.Generator().manual_seed(2)) + 0.5
    for k in (20, 300, 1500) if per == "token" else (40 * TOKENS, 900 * TOKENS):
        for factor in (None, scale):
            kept = NumbaSelect(TOKENS, LAYERS, FEATURES, k, per=per, threads=threads)
            for layer, block in enumerate(pre):
                kept.see(layer, block, scale=factor)
            score = pre if factor is None else pre * factor
            assert_kept(kept.finish(), expected(score, k, per), pre, f"{k}")


def test_the_misleading_sample_misleads() -> None:
    """`unlike_its_sample` is what it says: fewer than k numbers beat the sampled bound."""
    first = unlike_its_sample()[0].view(-1)
    k = 40 * TOKENS
    rank = int(pools.SAMPLE * k / len(first))
    assert (first > first[sampled_places(first)].sort(descending=True).values[2 * rank]).sum() < k
    assert len(first) >= 16 * pools.SAMPLE and len(first) * LAYERS > select.PER_THREAD


def test_a_bound_of_all_pools_is_beaten_by_k_of_them() -> None:
    """The bound is found from a sample: what it says is counted, and where it is wrong there is no new bound."""
    k, lowest = 20_000, np.iinfo(np.int32).min
    keys = np.random.default_rng(0).integers(-(2**30), 2**30, (3, 30_000), np.int32)
    count = np.array([30_000, 17, 12_345])
    every = np.concatenate([of_pool[:number] for of_pool, number in zip(keys, count, strict=True)])
    bound = pools.bound_of_all(k, len(every), keys, count)
    assert k <= (every > bound).sum() < 1.1 * k
    misleading = np.full_like(every, -5)
    misleading[np.arange(pools.SAMPLE) * len(every) // pools.SAMPLE] = 5
    for of_pool, number, end in zip(keys, count, np.cumsum(count), strict=True):
        of_pool[:number] = misleading[end - number : end]
    assert pools.bound_of_all(k, len(every), keys, count) == lowest
