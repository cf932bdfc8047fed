"""Triton's selection under its interpreter, against a stable sort; run by `test_kernels`, with TRITON_INTERPRET=1.

The interpreter takes milliseconds for each operation of a program. So a selection sees several hard layers at once, and
the sweep over all kinds of numbers is marked as slow.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from clt_plugins import Top
from clt_plugins.contract.model.kernels import Kernels
from clt_plugins.contract.select import Kept, Per
from clt_plugins.distributed.topk import Together
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.selection import KINDS, assert_kept, by_ranks, expected, numbers


@pytest.fixture
def triton() -> Kernels:
    return make_kernels("triton", torch.device("cpu"), load_plugins())


def assert_selects(
    kernels: Kernels, pre: Tensor, k: int, per: Per, *, score: Tensor | None = None, capacity: int = 0, **given: Tensor
) -> None:
    """Compare with a stable sort of the scores.

    Args:
        pre: [L, B, F]; score: a score of the caller's, of the same shape; given: scale and shift, [F].
    """
    layers, tokens, features = pre.shape
    search = kernels.select(tokens, layers, features, k, per=per, capacity=capacity)
    for layer, block in enumerate(pre):
        seen = block.clone()
        search.see(layer, seen, **({} if score is None else {"score": score[layer].clone()}), **given)
        seen.fill_(torch.nan)  # the encoder writes the next layer there
    if score is None:
        score = pre * given.get("scale", torch.tensor(1.0)) + given.get("shift", torch.tensor(0.0))
    kept = search.finish()
    places = min(max(k, capacity), layers * features * (tokens if per == "batch" else 1))
    assert len(kept.token) == places * (1 if per == "batch" else tokens)
    assert_kept(kept, expected(score, k, per), pre, f"the {k} best per {per} of {list(pre.shape)}, {pre.dtype}")


def hard_layers(tokens: int, features: int) -> Tensor:
    """Layers, [L, B, F], of which the second beats all numbers of the first."""
    normal, special = numbers("normal", tokens, 1, features), numbers("special", tokens, 1, features)
    return torch.cat([normal, torch.full_like(normal, 50.0), special])


def test_a_batch_of_layers_that_overflow_the_list(triton):
    """All 12,000 numbers of a layer reach the bound and are equal; the list holds 8,192."""
    assert_selects(triton, hard_layers(12, 1000), 700, "batch")


def test_a_batch_by_scale_and_shift_in_bfloat16(triton):
    pre = numbers("special", 7, 2, 33).bfloat16()
    scale = torch.tensor([0.3, 1.0, -2.0]).repeat(11)
    shift = torch.tensor([0.1, -torch.inf, -1.0]).repeat(11)
    assert_selects(triton, pre, 50, "batch", scale=scale, shift=shift, capacity=60)


def test_a_batch_with_fewer_numbers_than_are_kept(triton):
    pre = numbers("normal", 2, 2, 3)
    pre[1] = -torch.inf
    assert_selects(triton, pre, 12, "batch", score=-pre.double())
    assert_selects(triton, torch.full_like(pre, -torch.inf), 4, "batch")


def test_a_token_with_layers_that_overflow_the_list(triton):
    """All 600 numbers of a layer reach the bound and are equal; the list holds 512."""
    assert_selects(triton, hard_layers(2, 600), 7, "token")


def test_a_token_by_shift_in_float16(triton):
    pre = numbers("special", 2, 2, 33).half()
    shift = torch.tensor([0.1, -torch.inf, -1.0]).repeat(11)
    assert_selects(triton, pre, 5, "token", shift=shift, capacity=9)


def test_a_token_with_fewer_numbers_than_are_kept(triton):
    pre = numbers("normal", 2, 2, 3)
    pre[1, 1] = -torch.inf
    assert_selects(triton, pre, 9, "token", score=pre.double())


@pytest.mark.parametrize("per", ["batch", "token"])
def test_layers_with_a_number_of_their_own(triton, per):
    pre, k = numbers("ties", 3, 3, 10), [4, 1, 7]
    top = Top(k, 3, 3, 10, per=per, scope="layer", kernels=triton, capacity=[5, 1, 8])
    for layer, block in enumerate(pre):
        top.see(layer, block.clone())
    pairs, values = top.finish()
    assert len(values) == 3 * (5 + 1 + 8), "a fixed size"
    rows = 3 if per == "batch" else 1
    mask = torch.cat([expected(pre[n : n + 1], of_layer * rows, per) for n, of_layer in enumerate(k)])
    assert_kept(Kept(pairs.token, pairs.feature, values, pairs.count), mask, pre, f"the {k} best per {per}")


def assert_ranks_select(
    kernels: Kernels, pre: Tensor, k: int, per: Per, token_cuts: list[int], cuts: list[int]
) -> None:
    """Ranks with these parts of the tokens and shares of the features keep what one process keeps."""
    layers, tokens, features = pre.shape
    parts = [(slice(*t), slice(*f)) for t in pairwise(token_cuts) for f in pairwise(cuts)]

    def run(rank: int, total) -> Kept:
        rows, columns = parts[rank]
        own = pre[:, rows, columns]
        search = kernels.select(own.shape[1], layers, own.shape[2], k, per=per)
        for layer, block in enumerate(own):
            search.see(layer, block.clone())
        ranks = Together(
            per=per,
            n_layers=layers,
            own_tokens=own.shape[1],
            own_features=own.shape[2],
            sum=total,
            tokens=tokens if per == "batch" else own.shape[1],
            first_token=rows.start if per == "batch" else 0,
            features=features,
            first_feature=columns.start,
        )
        return search.finish(ranks)

    mask = expected(pre, k, per)
    for (rows, columns), kept in zip(parts, by_ranks(len(parts), run), strict=True):
        assert_kept(
            kept, mask[:, rows, columns], pre[:, rows, columns], f"{per}, {rows}, {columns} of {list(pre.shape)}"
        )


def test_a_batch_on_three_uneven_tensor_ranks(triton):
    assert_ranks_select(triton, numbers("ties", 3, 1, 10), 11, "batch", [0, 3], [0, 2, 7, 10])


def test_a_token_on_three_uneven_tensor_ranks(triton):
    assert_ranks_select(triton, numbers("ties", 2, 2, 10), 7, "token", [0, 2], [0, 2, 7, 10])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["batch", "token"])
def test_every_kind_of_numbers(triton, kind, per):
    for tokens, layers, features, k in ((5, 3, 900, 700), (4, 3, 10, 7), (2, 2, 3, 12)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            pre = numbers(kind, tokens, layers, features).to(dtype)
            assert_selects(triton, pre, min(k, 60) if per == "token" else k, per)
    scale, shift = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 50)
    assert_selects(triton, numbers(kind, 4, 2, 50), 30, per, scale=scale, shift=shift)
    data_ranks = [0, 4] if per == "token" else [0, 1, 4]
    assert_ranks_select(triton, numbers(kind, 4, 2, 20), 13, per, data_ranks, [0, 3, 11, 20])
