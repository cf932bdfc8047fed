"""Top-k in one pass against a stable sort of everything."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from clt_plugins import Above, Top, load_plugins
from clt_plugins.model.devices import make_kernels

SHAPES = [(7, 3, 11, 2), (5, 2, 64, 3), (64, 4, 256, 5), (3, 2, 4, 6), (16, 3, 2000, 4), (1, 1, 1, 1), (2, 3, 5, 99)]


@cache
def made(kernels: str) -> Any:
    return make_kernels(kernels, torch.device("cpu"), load_plugins())


def sorted_top(flat: torch.Tensor, k: int) -> torch.Tensor:
    """A mask of the k largest, ties to the lower index."""
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return mask


def naive(pre: torch.Tensor, k: Any, per: str, scope: str) -> torch.Tensor:
    """The mask [B, L, F] that `Top` should keep, group by group; k may be a list of one for each layer."""
    if isinstance(k, list):
        return torch.cat([naive(pre[:, n : n + 1], of_layer, per, "layer") for n, of_layer in enumerate(k)], 1)
    tokens, layers, features = pre.shape
    by_layer = pre.transpose(0, 1)  # ties over a batch go by layer, then token, then feature
    if per == "batch" and scope == "global":
        return sorted_top(by_layer.reshape(-1), k * tokens).view(layers, tokens, features).transpose(0, 1)
    if per == "batch":
        return torch.stack([sorted_top(x.reshape(-1), k * tokens).view_as(x) for x in by_layer], 1)
    if scope == "global":
        return torch.stack([sorted_top(x.reshape(-1), k).view_as(x) for x in pre])
    return torch.stack([torch.stack([sorted_top(y, k) for y in x]) for x in pre])


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("per, scope", list(itertools.product(["token", "batch"], ["global", "layer"])))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_keeps_exactly_what_a_stable_sort_keeps(shape, per, scope, ties, kernels):
    tokens, layers, features, k = shape
    pre = torch.randn(tokens, layers, features, generator=torch.Generator().manual_seed(0))
    if ties:
        pre = (pre * 3).round() / 3
    capacity = features * (layers if scope == "global" else 1)
    top = Top(k, tokens, layers, features, per=per, scope=scope, kernels=made(kernels))
    for layer in range(layers):
        top.see(layer, pre[:, layer])
    pairs, values = top.finish()
    kept = torch.zeros(tokens, layers * features, dtype=torch.bool)
    kept[pairs.token, pairs.feature] = True
    assert (kept.view_as(pre) == naive(pre, min(k, capacity), per, scope)).all()
    assert len(values) == kept.sum() == min(k, capacity) * tokens * (1 if scope == "global" else layers)
    assert (values == pre.flatten(1)[pairs.token, pairs.feature]).all()
    place = pairs.token * layers * features + pairs.feature
    assert (place.diff() > 0).all(), "pairs must be sorted by token, then feature"


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("per", ["token", "batch"])
@pytest.mark.parametrize("k", [[1, 7, 3], [64, 1, 2], [99, 5, 5]])
def test_each_layer_keeps_its_own_number(k, per, ties, kernels):
    pre = torch.randn(9, 3, 64, generator=torch.Generator().manual_seed(0))
    if ties:
        pre = (pre * 3).round() / 3
    top = Top(k, 9, 3, 64, per=per, scope="layer", kernels=made(kernels))
    for layer in range(3):
        top.see(layer, pre[:, layer])
    pairs, values = top.finish()
    kept = torch.zeros(9, 3 * 64, dtype=torch.bool)
    kept[pairs.token, pairs.feature] = True
    assert torch.equal(kept.view_as(pre), naive(pre, k, per, "layer"))
    assert len(values) == top.size == 9 * sum(min(one, 64) for one in k)
    assert torch.equal(values, pre.flatten(1)[pairs.token, pairs.feature])
    assert (pairs.token * 3 * 64 + pairs.feature).diff().min() > 0, "pairs must be sorted by token, then feature"


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("form", ["score", "affine"])
def test_a_score_of_minus_infinity_is_never_kept(form, kernels):
    pre = torch.ones(4, 6)
    closed = torch.tensor([0.0, -torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf])
    forms = {"score": lambda layer, pre: pre + closed, "affine": lambda layer, pre: (None, closed)}
    top = Top(3, 4, 1, 6, per="token", kernels=made(kernels), **{form: forms[form]})
    top.see(0, pre)
    pairs, values = top.finish()
    assert pairs.token.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pairs.feature.tolist() == [0, 3] * 4
    assert values.tolist() == [1.0] * 8


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_a_nan_is_kept_so_that_the_loss_shows_it(kernels):
    pre = torch.zeros(4, 50)
    pre[2, 7] = torch.nan
    for per in ("token", "batch"):
        top = Top(1, 4, 1, 50, per=per, kernels=made(kernels))
        top.see(0, pre)
        _, values = top.finish()
        assert values.isnan().sum() == 1


def test_above_keeps_what_passes_each_bound():
    pre = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    bound = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    above = Above(bound, 5, 2, 8)
    for layer in range(2):
        above.see(layer, pre[:, layer])
    pairs, values = above.finish()
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[pairs.token, pairs.feature] = True
    assert torch.equal(kept.view_as(pre), pre > bound)
    assert torch.equal(values, pre.flatten(1)[kept])
