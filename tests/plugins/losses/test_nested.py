"""Losses of parts of the features and of counts, against loops over single numbers in float64."""

from __future__ import annotations

import itertools
import math

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import Features, Pairs, Single
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import assemble
from clt_plugins.training.objective import objective
from tests.plugins.losses.test_formulas import DECODER, B, D, F, L, built, draw, make_forward, same
from tests.support.helpers import ACTIVATIONS, parts, random_batch, recipe, stir


def sparse(acts: Tensor) -> Features:
    pairs = Pairs.from_mask(acts > 0)
    return Features(acts.flatten(1)[pairs.token, pairs.feature], pairs)


def written(acts: Tensor) -> Tensor:
    return torch.einsum("bn,nld->bld", acts.flatten(1), DECODER)


def error(forward, reconstruction: Tensor) -> float:
    """What `mse` is with another reconstruction."""
    total = 0.0
    for b, s, d in itertools.product(range(B), range(L), range(D)):
        difference = float(reconstruction[b, s, d] - forward.targets[b, s, d]) * float(forward.units.scale[s, d])
        total += difference**2 / float(forward.variance[s]) / (B * D)
    return total


def assert_mean_of_parts(name: str, kept: list[Tensor], **settings: object) -> None:
    """The loss is the mean over parts of the error of a reconstruction from that part alone; so are its gradients, by
    values and by the bias.

    Args:
        kept: the values of each part, [B, L, F]; 0 elsewhere.
    """
    forward = make_forward()
    acts, bias = forward.features.values, draw(B, L, D, seed=20).requires_grad_()
    features = sparse(acts)
    assert features.pairs is not None
    features.values.requires_grad_()
    token, feature = features.pairs.token, features.pairs.feature
    complete = torch.zeros(B, L, D, dtype=torch.float64)
    complete = complete.index_add(0, token, features.values[:, None, None] * DECODER[feature]) + bias
    forward = attrs.evolve(forward, features=features, reconstruction=complete)
    (term,) = built(name, weight=0.4, **settings)(forward).values()
    term.backward()
    expected = 0.0
    by_value, by_bias = torch.zeros_like(features.values), torch.zeros_like(bias)
    for part in kept:
        reconstruction = written(part) + bias.detach()
        expected += 0.4 * error(forward, reconstruction) / len(kept)
        for b, s, d in itertools.product(range(B), range(L), range(D)):
            difference = float(reconstruction[b, s, d] - forward.targets[b, s, d])
            factor = float(forward.units.scale[s, d]) ** 2 / float(forward.variance[s]) / (B * D)
            slope = 0.4 * 2 * difference * factor / len(kept)
            by_bias[b, s, d] += slope
            for n in range(len(token)):
                if int(token[n]) == b and float(part[b].flatten()[feature[n]]) > 0:
                    by_value[n] += slope * float(DECODER[feature[n], s, d])
    same(term, expected)
    torch.testing.assert_close(bias.grad, by_bias, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features.values.grad, by_value, rtol=1e-9, atol=1e-12)
    assert (by_value == 0).any(), "a feature outside every part gets no gradient"


def test_matryoshka_is_the_mean_error_of_prefixes() -> None:
    parts_of = []
    for prefix in (3, 7):  # of 10 features
        kept = make_forward().features.values.clone()
        kept[:, :, prefix:] = 0
        parts_of.append(kept)
    assert_mean_of_parts("matryoshka", parts_of, prefixes=[0.3, 0.7])


@pytest.mark.parametrize("per", ["token", "batch"])
def test_hierarchical_is_the_mean_error_of_the_highest_values(per: str) -> None:
    acts, parts_of = make_forward().features.values, []
    for share in (0.25, 0.5):
        kept = torch.zeros_like(acts)
        for group in [[b] for b in range(B)] if per == "token" else [list(range(B))]:
            places = [p for p in itertools.product(group, range(L), range(F)) if float(acts[p]) > 0]
            for place in sorted(places, key=lambda p: -float(acts[p]))[: math.ceil(share * len(places))]:
                kept[place] = acts[place]
        parts_of.append(kept)
    assert_mean_of_parts("hierarchical", parts_of, shares=[0.25, 0.5], per=per)


@pytest.mark.parametrize("name", ["matryoshka", "hierarchical"])
def test_nested_losses_are_the_same_for_dense_features_and_for_fixed_sizes(name: str) -> None:
    made = parts(losses=[{"name": name}], transcoder={"dtype": "float64"}, activation={"name": "relu"})
    stir(made.transcoder)
    batch, loss = random_batch(8, 3, 6, torch.float64), made.losses
    idle = torch.zeros(made.transcoder.shape, dtype=torch.int64)
    made.transcoder.runs_dense = False
    of_pairs = objective(made.transcoder, loss, batch, idle, 0.5)
    made.transcoder.zero_grad()
    of_pairs.total.backward()
    gradients = [p.grad.clone() for p in made.transcoder.parameters() if p.grad is not None]
    made.transcoder.runs_dense = True
    dense = objective(made.transcoder, loss, batch, idle, 0.5)
    made.transcoder.zero_grad()
    dense.total.backward()
    torch.testing.assert_close(dense.total, of_pairs.total, rtol=1e-12, atol=0)
    for p, expected in zip([p for p in made.transcoder.parameters() if p.grad is not None], gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
    # Empty places at the end, as on a GPU: they have the last token and feature, and the value 0.
    forward = make_forward()
    features = sparse(forward.features.values)
    assert features.pairs is not None
    count = len(features.values)
    padded = Pairs(
        torch.nn.functional.pad(features.pairs.token, (0, 3), value=B - 1),
        torch.nn.functional.pad(features.pairs.feature, (0, 3), value=L * F - 1),
        B, L, F, torch.tensor(count),
    )  # fmt: skip
    longer = Features(torch.nn.functional.pad(features.values, (0, 3)), padded)
    (one,), (other,) = (built(name)(attrs.evolve(forward, features=some)).values() for some in (features, longer))
    same(one, float(other))


def pre_activations() -> Tensor:
    return draw(B, L, F, seed=4) * 0.5


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("target", [None, 3.0])
def test_l0_and_its_gradient_by_thresholds(target: float | None, path: str) -> None:
    settings = {"weight": 0.3, "target": target, "frequency_weight": 0.2, "frequency_above": 0.3}
    made = parts(
        losses=[{"name": "l0", **settings}],
        activation=ACTIVATIONS["jumprelu"],
        transcoder={"dtype": "float64", "path": path},
    )
    stir(made.transcoder)
    transcoder, batch = made.transcoder, random_batch(B, 3, 6, torch.float64)
    outcome = objective(transcoder, made.losses, batch, torch.zeros(transcoder.shape, dtype=torch.int64), 0.0)
    outcome.total.backward()
    with torch.no_grad():
        pre = torch.einsum("bld,lfd->blf", transcoder.normaliser.inputs(batch.inputs), transcoder.W_enc)
        pre += transcoder.b_enc
    theta = transcoder.activation.threshold().detach()
    width = ACTIVATIONS["jumprelu"]["bandwidth"] * theta
    n_features = pre.shape[2]
    frequency = [[sum(float(pre[b, s, f]) > float(theta[s, f]) for b in range(B)) / B for f in range(n_features)]
                 for s in range(3)]  # fmt: skip
    l0 = sum(map(sum, frequency))
    expected = 0.3 * (l0 if target is None else (l0 / target - 1) ** 2)
    excess = [[max(0.0, x / 0.3 - 1) for x in row] for row in frequency]
    expected += 0.2 * sum(x**2 for row in excess for x in row)
    same(outcome.total, expected)
    for s, f in itertools.product(range(3), range(n_features)):
        by_l0 = 0.3 * (1 if target is None else 2 * (l0 / target - 1) / target)
        by_frequency = by_l0 + 0.2 * 2 * excess[s][f] / 0.3
        near = sum(abs(float(pre[b, s, f] - theta[s, f])) < float(width[s, f]) / 2 for b in range(B))
        # d frequency / d θ = -near / (ε B), and θ is exp of the parameter.
        gradient = by_frequency * -near / (float(width[s, f]) * B) * float(theta[s, f])
        assert float(transcoder.activation.log_threshold.grad[s, f]) == pytest.approx(gradient, rel=1e-9, abs=1e-12)
    assert all(p.grad is None or not p.grad.any() for p in (transcoder.W_enc, transcoder.b_enc))


def test_l0_is_refused_where_it_trains_nothing() -> None:
    with pytest.raises(Faults, match=r"losses\[0\]: l0 trains thresholds, and 'batchtopk' learns none"):
        recipe(losses=[{"name": "l0"}])


def test_hierarchical_is_refused_where_features_are_split() -> None:
    class Two(Single):
        tensor_ranks = 2

    with pytest.raises(Faults, match=r"hierarchical: ranks values of one process"):
        assemble(recipe(losses=[{"name": "hierarchical"}]), parallel=Two())
