"""Fixed sizes, as on a GPU, keep what sizes that follow the numbers keep; columns; layers apart; empty places."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from clt_kernels.cpu.kernels import NumbaKernels
from clt_kernels.reference import TorchKernels
from clt_plugins import Pairs, Top
from clt_plugins.testing.selection import KINDS, numbers

TOKENS, LAYERS, FEATURES = 9, 3, 40


def selected(kernels: Any, pre: torch.Tensor, k: Any, **settings: Any) -> tuple[Pairs, torch.Tensor]:
    layers, tokens, features = pre.shape
    top = Top(k, tokens, layers, features, kernels=kernels, **settings)
    for layer, block in enumerate(pre):
        top.see(layer, block.clone())
    return top.finish()


def assert_same_with_empty_places(narrow: Any, fixed: Any, size: int) -> None:
    (pairs, pre), (padded, padded_pre) = narrow, fixed
    count = int(padded.count)
    assert len(padded.token) == len(padded_pre) == size
    assert count == len(pairs.token)
    assert torch.equal(padded.token[:count], pairs.token)
    assert torch.equal(padded.feature[:count], pairs.feature)
    assert torch.equal(padded_pre[:count].nan_to_num(7), pre.nan_to_num(7))
    assert (padded.token[count:] == pairs.tokens - 1).all()
    assert (padded.feature[count:] == pairs.n_layers * pairs.n_features - 1).all()
    assert (padded_pre[count:] == -torch.inf).all()


@pytest.mark.parametrize("per, scope", list(itertools.product(["token", "batch"], ["global", "layer"])))
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_sizes_keep_the_same(kind: str, per: Any, scope: Any) -> None:
    pre = numbers(kind, TOKENS, LAYERS, FEATURES).float()
    shift = torch.where(torch.arange(FEATURES) % 5 == 0, -torch.inf, 0.0)
    for k in (1, 6, FEATURES * LAYERS):
        capacity = min(k + 2, FEATURES * (LAYERS if scope == "global" else 1))
        settings = {"per": per, "scope": scope, "affine": lambda layer, pre: (None, shift)}
        fixed = selected(TorchKernels(fixed=True), pre, k, capacity=k + 2, **settings)
        size = capacity * TOKENS * (1 if scope == "global" else LAYERS)
        for kernels in (TorchKernels(), NumbaKernels()):
            assert_same_with_empty_places(selected(kernels, pre, k, **settings), fixed, size)


@pytest.mark.parametrize("per", ["token", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_sizes_keep_the_same_where_each_layer_has_its_own_number(kind: str, per: Any) -> None:
    pre, k, capacity = numbers(kind, TOKENS, LAYERS, FEATURES).float(), [1, 40, 6], [3, 44, 6]
    fixed = selected(TorchKernels(fixed=True), pre, k, per=per, scope="layer", capacity=capacity)
    for kernels in (TorchKernels(), NumbaKernels()):
        narrow = selected(kernels, pre, k, per=per, scope="layer")
        assert_same_with_empty_places(narrow, fixed, TOKENS * (3 + 40 + 6))


@pytest.mark.parametrize(
    "kernels", [TorchKernels(), TorchKernels(fixed=True), NumbaKernels()], ids=["", "fixed", "numba"]
)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_columns_are_all_that_is_looked_at(kernels: Any, scope: Any) -> None:
    pre = numbers("ties", TOKENS, LAYERS, FEATURES).float()
    columns = torch.tensor([[0, 3, 17, 39], [5, 6, 39, 39], [39, 39, 39, 39]])
    filled = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    shift = torch.where(filled, 0.0, -torch.inf)
    everywhere = torch.full((LAYERS, FEATURES), -torch.inf)
    for layer in range(LAYERS):
        everywhere[layer, columns[layer][filled[layer]]] = 0.0
    settings: dict[str, Any] = {"per": "token", "scope": scope}
    whole, values = selected(TorchKernels(), pre, 5, affine=lambda layer, pre: (None, everywhere[layer]), **settings)
    some = selected(kernels, pre, 5, affine=lambda layer, pre: (None, shift[layer]), columns=columns, **settings)
    count = len(some[1]) if some[0].count is None else int(some[0].count)
    assert count == len(whole.token) > 0
    assert torch.equal(some[0].token[:count], whole.token)
    assert torch.equal(some[0].feature[:count], whole.feature)
    assert torch.equal(some[1][:count], values)
    assert (some[0].feature[count:] == LAYERS * FEATURES - 1).all()


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has a pool for each thread, a token may be in any of them."""
    from clt_kernels.cpu import select

    monkeypatch.setattr(select, "PER_THREAD", 64)
    monkeypatch.setattr(select, "PER_THREAD_CUT", 64)
    before = torch.get_num_threads()
    for kind in KINDS:
        pre = numbers(kind, 31, LAYERS, FEATURES).float()
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found += [selected(NumbaKernels(), pre, 4, per=per) for per in ("batch", "token")]
        finally:
            torch.set_num_threads(before)
        for (pairs, values), (same, equal) in zip(found[:2] * 2, found[2:], strict=True):
            assert torch.equal(pairs.token, same.token) and torch.equal(pairs.feature, same.feature)
            assert torch.equal(values.nan_to_num(7), equal.nan_to_num(7))
