"""The formulas of the activations, against loops over single numbers in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from clt_plugins.errors import Faults
from tests.support.helpers import parts, recipe

B, L, F = 7, 3, 10
CELLS = list(itertools.product(range(B), range(L), range(F)))


def built(**settings: Any) -> Any:
    return parts(activation=settings, transcoder={"dtype": "float64"}).transcoder.activation.eval()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_of(activation: Any, pre: Tensor, norms: Tensor | None = None) -> dict[tuple[int, int, int], float]:
    """What is selected: the value of each (token, layer, feature)."""
    selection = activation.selection(len(pre), lambda: norms)
    for layer in range(L):
        selection.see(layer, pre[:, layer])
    pairs, kept = selection.finish()
    values = activation(kept, pairs.feature)
    places = zip(pairs.token.tolist(), (pairs.feature // F).tolist(), (pairs.feature % F).tolist(), strict=True)
    return dict(zip(places, values.tolist(), strict=True))


def assert_gradient_where_positive(activation: Any, pre: Tensor, kept: dict[tuple[int, int, int], float]) -> None:
    """∂value/∂pre is 1 for a pair that is kept and above 0, else 0.

    Args:
        kept: what must be kept, with its value.
    """
    selection = activation.selection(len(pre), lambda: draw(L, F, seed=4).exp())
    for layer in range(L):
        selection.see(layer, pre[:, layer])
    pairs, _ = selection.finish()
    leaf, weights = pre.clone().requires_grad_(), draw(B, L, F, seed=30)
    values = activation(leaf.flatten(1)[pairs.token, pairs.feature], pairs.feature)
    (values * weights.flatten(1)[pairs.token, pairs.feature]).sum().backward()
    expected = torch.zeros(B, L, F, dtype=torch.float64)
    for place, value in kept.items():
        expected[place] = float(weights[place]) if value > 0 else 0.0
    assert torch.equal(leaf.grad, expected)


def scores(pre: Tensor, norms: Tensor, ranking: str) -> dict[tuple[int, int, int], float]:
    """What each pre-activation is ranked by."""
    out = {}
    for b, s, f in CELLS:
        x = float(pre[b, s, f])
        column = [float(pre[i, s, f]) for i in range(B)]
        mean = sum(column) / B
        deviation = math.sqrt(sum((y - mean) ** 2 for y in column) / (B - 1))
        out[b, s, f] = {"raw": x, "norm": x * float(norms[s, f]), "zscore": (x - mean) / (deviation + 1e-6)}[ranking]
    return out


@pytest.mark.parametrize("ranking", ["raw", "norm", "zscore"])
@pytest.mark.parametrize("k, scope", [(8, "global"), (3, "layer"), ([1, 4, 2], "layer")], ids=str)
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_k_highest_scores_are_kept_and_pass_a_relu(name: str, k: Any, scope: str, ranking: str) -> None:
    # Means and spreads differ between features, so that the three rankings select differently.
    pre, norms = draw(B, L, F, seed=1) * draw(L, F, seed=2).exp() + draw(L, F, seed=3), draw(L, F, seed=4).exp()
    by_place = scores(pre, norms, ranking)
    expected: dict[tuple[int, int, int], float] = {}
    tokens = [[b] for b in range(B)] if name == "topk" else [list(range(B))]
    layers = [[s] for s in range(L)] if scope == "layer" else [list(range(L))]
    for some_tokens, some_layers in itertools.product(tokens, layers):
        group = [place for place in CELLS if place[0] in some_tokens and place[1] in some_layers]
        count = k[some_layers[0]] if isinstance(k, list) else k
        best = sorted(group, key=lambda place: -by_place[place])[: count * len(some_tokens)]
        expected.update({place: max(0.0, float(pre[place])) for place in best})
    # A list says by itself that each layer selects.
    settings = {"k": k, "ranking": ranking} | ({} if isinstance(k, list) else {"scope": scope})
    activation = built(name=name, **settings)
    assert values_of(activation, pre, norms) == expected
    assert_gradient_where_positive(activation, pre, expected)
    assert 0.0 in expected.values() or ranking != "zscore", "a ReLU has something to do"


def test_a_share_is_rounded_up_to_a_count_of_the_features_in_scope() -> None:
    pre = draw(B, L, F, seed=1)
    assert len(values_of(built(name="topk", k=0.11), pre)) == B * 4  # 3.3 of 30
    assert len(values_of(built(name="topk", k=0.11, scope="layer"), pre)) == B * L * 2  # 1.1 of 10
    assert len(values_of(built(name="topk", k=[0.11, 4, 0.3]), pre)) == B * (2 + 4 + 3)
    # In floating-point numbers 0.7 of 30 is 21, 0.07 of 100 is 7.000000000000001, and so on.
    counted = [
        parts(activation={"name": "topk", "k": k}, transcoder={"features": 100}).transcoder.activation.k
        for k in (0.07, 0.14)
    ]
    assert counted == [[21], [42]]


def test_a_k_of_each_layer_falls_as_one_k_does() -> None:
    activation = built(name="topk", k=[1, 2, 4], anneal_from=3.0, anneal_over=0.5).train()
    pre = draw(B, L, F, seed=1)
    for done, counts in ((0.0, [3, 6, 10]), (0.25, [2, 4, 8]), (0.5, [1, 2, 4]), (1.0, [1, 2, 4])):
        activation.schedule(done)
        layers = [layer for _, layer, _ in values_of(activation, pre)]
        assert [layers.count(layer) for layer in range(L)] == [B * count for count in counts], done


@pytest.mark.parametrize(
    ("k", "text"),
    [
        ([2, 3], "activation.k: has 2 numbers for 3 layers: give one for each layer, or one for all"),
        ([2, 11, 3], r"activation.k\[1\]: 11 of each layer, but transcoder.features is 10"),
        ([2, 1.5, 3], r"activation.k\[1\]: a count must be whole, a share below 1: 1.5"),
        ([2, 0, 3], r"activation.k: must be > 0: \[2, 0, 3\]"),
        ([], r"activation.k: must be > 0: \[\]"),
        ([2, "x", 3], r'activation.k\[1\]: expected int or float, got "x"'),
    ],
)
def test_a_k_of_each_layer_that_does_not_fit_is_refused(k: Any, text: str) -> None:
    with pytest.raises(Faults, match=text):
        built(name="topk", k=k)


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_an_l0_of_more_than_all_features_is_refused(name: str) -> None:
    assert built(name=name, target_l0=L * F).target_l0(1.0) == L * F
    with pytest.raises(Faults, match=r"activation\.target_l0: 30\.5 is more than the 30 features: lower it"):
        built(name=name, target_l0=L * F + 0.5)


def test_zscore_of_batches_of_one_token_is_refused_before_training() -> None:
    with pytest.raises(Faults, match=r'activation\.ranking: "zscore" needs train\.batch_tokens of at least 2'):
        recipe(activation={"name": "topk", "k": 4, "ranking": "zscore"}, train={"batch_tokens": 1})


def test_zscore_of_a_single_token_compares_the_pre_activations_themselves() -> None:
    """Its standard deviation is 0 / 0."""
    pre = draw(1, L, F, seed=5)
    best = sorted(itertools.product(range(L), range(F)), key=lambda place: -float(pre[0, *place]))[:4]
    expected = {(0, *place): max(0.0, float(pre[0, *place])) for place in best}
    for name in ("topk", "batchtopk"):
        assert values_of(built(name=name, k=4, ranking="zscore"), pre) == expected


def test_relu_keeps_what_is_positive() -> None:
    pre = draw(B, L, F, seed=1)
    expected = {place: float(pre[place]) for place in CELLS if float(pre[place]) > 0}
    assert values_of(built(name="relu"), pre) == expected
    assert float(built(name="relu").threshold().abs().max()) == 0


def jumprelu(threshold: Tensor) -> Any:
    activation = built(name="jumprelu", bandwidth=0.8)
    activation.set_threshold(threshold)
    return activation


def test_jumprelu_keeps_what_is_above_its_threshold_unchanged() -> None:
    pre, activation = draw(B, L, F, seed=1), jumprelu(draw(L, F, seed=2).abs() + 0.05)
    threshold = activation.threshold().detach()
    pre[0, 0, 0] = threshold[0, 0]  # not above it
    expected = {place: float(pre[place]) for place in CELLS if float(pre[place]) > float(threshold[place[1:]])}
    assert values_of(activation, pre) == expected


@pytest.mark.parametrize("sparse", [False, True])
def test_jumprelu_has_the_pseudo_derivative_of_equation_11(sparse: bool) -> None:
    """-θ/ε within ε/2 of the threshold, on both sides of it; else 0. ε is 0.8 θ. By log θ it is θ times that."""
    pre, weights = draw(B, L, F, seed=1).requires_grad_(), draw(B, L, F, seed=3)
    activation = jumprelu(draw(L, F, seed=2).abs() + 0.05).train()
    if sparse:
        selection = activation.selection(B, lambda: None)
        for layer in range(L):
            selection.see(layer, pre.detach()[:, layer])
        pairs, _ = selection.finish()
        values = activation(pre.flatten(1)[pairs.token, pairs.feature], pairs.feature)
        (values * weights.flatten(1)[pairs.token, pairs.feature]).sum().backward()
    else:
        (activation(pre, None) * weights).sum().backward()
    by_pre = torch.zeros(B, L, F, dtype=torch.float64)
    by_log_threshold = torch.zeros(L, F, dtype=torch.float64)
    thresholds, below = activation.threshold().detach(), 0
    for b, s, f in CELLS:
        theta, x, weight = float(thresholds[s, f]), pre[b, s, f].item(), float(weights[b, s, f])
        if x > theta:
            by_pre[b, s, f] = weight
        epsilon = 0.8 * theta
        if abs(x - theta) < epsilon / 2:
            by_log_threshold[s, f] += weight * (-theta / epsilon) * theta
            below += x < theta
    assert below > 3, "features just below their threshold count, too"
    assert torch.equal(pre.grad, by_pre)
    torch.testing.assert_close(activation.log_threshold.grad, by_log_threshold, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("k", "bounds"), [(6, (0, 5, 10)), (9, (0, 3, 6, 10)), (30, range(11))])
def test_groupmax_keeps_the_highest_of_each_group_of_neighbours(k: int, bounds: Sequence[int]) -> None:
    pre = draw(B, L, F, seed=1)
    activation = built(name="groupmax", k=k)
    expected: dict[tuple[int, int, int], float] = {}
    for b, s, (first, last) in itertools.product(range(B), range(L), itertools.pairwise(bounds)):
        best = max(range(first, last), key=lambda f: float(pre[b, s, f]))
        expected[b, s, best] = max(0.0, float(pre[b, s, best]))
    assert values_of(activation, pre) == expected
    assert_gradient_where_positive(activation, pre, expected)


@pytest.mark.parametrize(("k", "text"), [(7, "a multiple of the 3 layers"), (33, "more than the 30 features")])
def test_groupmax_refuses_groups_that_do_not_come_out(k: int, text: str) -> None:
    with pytest.raises(Faults, match=text):
        built(name="groupmax", k=k)
