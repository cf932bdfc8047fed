"""`fit_decoder` against the normal equations, solved densely in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clt_plugins.errors import Faults, Refused
from tests.plugins.callbacks.test_formulas import Opened
from tests.support.helpers import TYINGS, recipe, stir

BATCH = 16
"""Tokens of a batch of the small recipe; it has 10 features in each of 3 layers."""


def fitted(tying: dict[str, Any], **settings: Any) -> tuple[Opened, Tensor, Tensor, Tensor]:
    """A run with a fitted decoder; the features [T, L, F], the residuals before the fit [T, L, D], and the targets."""
    config = {"name": "fit_decoder", "tokens": 8 * BATCH, "iterations": 200, **settings}
    opened = Opened(config, tying=tying, activation={"name": "topk", "k": 5})
    stir(opened.transcoder)
    batches = list(opened.batches(-(-config["tokens"] // BATCH)))
    inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("inputs", "targets"))
    opened.transcoder.eval()
    features = opened.transcoder.encode(inputs).dense().detach()
    before = targets - opened.transcoder(inputs).detach()
    opened.callback.start(opened.run)
    opened.callback.finish(opened.run)
    torch.testing.assert_close(opened.transcoder.encode(inputs).dense(), features, msg="the encoder stays")
    return opened, features, before, targets - opened.transcoder(inputs).detach()


@pytest.mark.parametrize("ridge", [0.03, 1.0])
def test_rows_and_biases_are_those_of_the_normal_equations(ridge):
    config = {"name": "fit_decoder", "tokens": 8 * BATCH, "iterations": 200, "ridge": ridge}
    opened = Opened(config, activation={"name": "topk", "k": 5})
    stir(opened.transcoder)
    first = {name: value.detach().clone() for name, value in opened.transcoder.tensors().items()}
    batches = list(opened.batches(8))
    inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("inputs", "targets"))
    opened.transcoder.eval()
    features = opened.transcoder.encode(inputs).dense().detach()
    residual = targets - opened.transcoder(inputs).detach()
    opened.callback.finish(opened.run)

    squares = features.square().sum(0)
    c = ridge * squares.sum() / (squares > 0).sum()
    for t in range(3):
        # A column of ones for the bias, which is not held.
        columns = torch.cat([features[:, : t + 1].flatten(1), torch.ones(len(features), 1)], 1)
        held = torch.diag(torch.cat([c.expand(10 * (t + 1)), torch.zeros(1)]))
        expected = torch.linalg.solve(columns.T @ columns + held, columns.T @ residual[:, t])
        moved = [opened.transcoder.tensors()[f"W_dec.{s:02}"] - first[f"W_dec.{s:02}"] for s in range(t + 1)]
        got = torch.cat([*(rows[:, t - s] for s, rows in enumerate(moved)), moved_bias(opened, first)[t : t + 1]])
        # 200 iterations solve 31 unknowns to rounding.
        torch.testing.assert_close(got.detach(), expected, rtol=1e-7, atol=1e-9)


def moved_bias(opened: Opened, first: dict[str, Tensor]) -> Tensor:
    return opened.transcoder.tensors()["b_dec"] - first["b_dec"]


@pytest.mark.parametrize("tying", [name for name in TYINGS if not name.startswith("per_target")])
def test_the_penalised_error_is_at_its_minimum_for_every_tying(tying):
    """No small change of any row or bias makes the sum of squares plus the penalty smaller."""
    opened, features, before, after = fitted(TYINGS[tying], ridge=0.0)
    assert after.square().sum() < before.square().sum()
    rows = {opened.transcoder.tying.feature_rows(layer)[0] for layer in range(3)}
    inputs = torch.cat([batch.inputs for batch in opened.batches(8)])
    targets = torch.cat([batch.targets for batch in opened.batches(8)])
    error = (targets - opened.transcoder(inputs)).square().sum()
    parameters = [opened.transcoder.get_parameter(f"tying.{name}") for name in [*sorted(rows), "b_dec"]]
    for parameter in parameters:
        parameter.grad = None
    error.backward()
    for parameter in parameters:
        # The gradient at the start is of the order of the error itself.
        assert parameter.grad.abs().max() < 1e-5 * before.square().sum()


def test_a_tying_without_rows_of_features_is_refused_before_training():
    opened = Opened({"name": "fit_decoder"}, tying={"name": "per_target"})
    with pytest.raises(Refused, match="no decoder rows of their own"):
        opened.callback.start(opened.run)


def test_a_frozen_decoder_is_refused_before_training():
    opened = Opened({"name": "fit_decoder"})
    opened.transcoder.tying.weight.requires_grad_(False)
    with pytest.raises(Refused, match=r"transcoder\.freeze holds the decoder"):
        opened.callback.start(opened.run)


@pytest.mark.parametrize("encoder", [{"name": "tied"}, {"name": "tied", "normalise": True, "scale": True}], ids=str)
def test_an_encoder_made_of_the_decoder_is_refused_before_training(encoder):
    """The fit changed every pre-activation: an NMSE of 0.81 became one of 4, and the log told of a gain."""
    opened = Opened({"name": "fit_decoder"}, encoder=encoder)
    with pytest.raises(Refused, match="the rows of the encoder 'tied' are the decoder's"):
        opened.callback.start(opened.run)
    opened = Opened({"name": "fit_decoder"}, encoder={"name": "low_rank", "rank": 2})
    opened.callback.start(opened.run)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_the_gain_is_the_share_of_the_error_that_is_gone(ridge):
    opened, _, before, after = fitted({"name": "untied"}, ridge=ridge)
    (told,) = opened.run._logged
    gain = 1 - after.square().sum() / before.square().sum()
    assert told["fit_decoder/gain"] == pytest.approx(float(gain), rel=1e-6)
    assert gain > 0.05


def test_few_iterations_already_gain_most():
    gains = []
    for iterations in (1, 4, 200):
        _, _, before, after = fitted({"name": "untied"}, ridge=0.1, iterations=iterations)
        gains.append(float(1 - after.square().sum() / before.square().sum()))
    assert 0 < gains[0] < gains[1] < gains[2] < gains[1] / 0.9


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"transcoder": {"dtype": "bfloat16"}}, "callbacks[0]: 'fit_decoder' needs transcoder.dtype = \"float32\""),
        ({"callbacks": [{"name": "fit_decoder", "ridge": -1.0}]}, "callbacks[0].ridge"),
        ({"callbacks": ["fit_decoder", "tied_start", "ema"]}, "callbacks[0]: 'fit_decoder' stands before 'ema'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changed, text):
    with pytest.raises(Faults) as caught:
        recipe(**{"callbacks": ["fit_decoder"], **changed})
    assert text in str(caught.value)
