"""Each normalisation against its plain formula, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clt_plugins import Batch, CrossLayerTranscoder, run
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.training.objective import objective
from tests.support.helpers import parts, tables

METHODS = ("none", "mean_std", "rms", "sqrt_d_model")


def batches(mean: float = 3.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for tokens in (5, 17, 30):
        pair = [torch.randn(tokens, 2, 4, generator=generator, dtype=torch.float64) * 2 + mean for _ in range(2)]
        drawn.append(Batch(*pair))
    return drawn


def fitted(name: str, drawn: list[Batch] | None = None, **settings: Any) -> CrossLayerTranscoder:
    """A transcoder of 2 layers, 4 dimensions, with statistics of some batches."""
    transcoder = parts(
        source={"layers": 2, "d_model": 4},
        normalisation={"name": name, **settings},
        transcoder={"dtype": "float64"},
    ).transcoder
    fit_to_batches(transcoder, drawn or batches())
    return transcoder


@pytest.mark.parametrize("method", METHODS)
def test_restoring_undoes_normalising(method):
    built, x = fitted(method).normaliser, batches()[2].targets
    torch.testing.assert_close(built.restore(built.targets(x)), x, rtol=1e-12, atol=1e-12)


def test_each_method_does_what_its_name_says():
    x = torch.cat([batch.inputs for batch in batches()])
    assert fitted("none").normaliser.inputs(x) is x, "no copy where nothing changes"
    norms = fitted("sqrt_d_model").normaliser.inputs(x).norm(dim=-1)
    torch.testing.assert_close(norms.mean(0), torch.full((2,), 2.0, dtype=torch.float64))  # sqrt(4)
    standard = fitted("mean_std").normaliser.inputs(x)
    torch.testing.assert_close(standard.mean(0), torch.zeros(2, 4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(2, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    scaled = fitted("rms").normaliser.inputs(x)
    torch.testing.assert_close(scaled.square().mean((0, 2)), torch.ones(2, dtype=torch.float64))


def test_a_mean_a_thousand_times_the_deviation_costs_no_digits_but_those_of_the_activations_themselves():
    sizes = torch.tensor([1e-2, 1.0, 30.0, 1.0], dtype=torch.float64)
    means = torch.tensor([10.0, 1e3, 3e4, 0.0], dtype=torch.float64)
    drawn = [Batch(*((x * sizes + means).float() for x in (b.inputs, b.targets))) for b in batches(0.0)]
    transcoder = parts(source={"layers": 2, "d_model": 4}, normalisation={"name": "mean_std"}).transcoder
    fit_to_batches(transcoder, drawn)
    shift, scale = (transcoder.statistics()[f"input_{name}"].double() for name in ("shift", "scale"))
    raw = drawn[2].inputs
    wrong = transcoder.normaliser.inputs(raw).double() - (raw.double() - shift) / scale
    # A rounding of raw is at most half a unit in its last place. There are three roundings of such numbers.
    assert (wrong.abs() <= 3 * 2**-24 * (raw.double().abs() / scale + 1)).all()


def test_a_dimension_that_never_varied_is_scaled_like_the_others_of_its_layer():
    drawn = batches()
    for batch in drawn:
        batch.inputs[:, 0, 1] = 0.1
        batch.targets[:, 1] = 7.0
    transcoder = fitted("mean_std", drawn)
    built, stored = transcoder.normaliser, transcoder.statistics()
    others = torch.cat([batch.inputs for batch in drawn])[:, 0, [0, 2, 3]].std(0)
    expected = others.square().mean().sqrt() + 1e-6
    assert float(stored["input_scale"][0, 1]) == pytest.approx(float(expected), rel=1e-9)
    x = drawn[0].inputs.clone()
    assert built.inputs(x)[:, 0, 1].abs().max() < 1e-6
    x[:, 0, 1] += expected
    torch.testing.assert_close(built.inputs(x)[:, 0, 1], torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0)
    # A layer that writes a constant: its error and its variance shrink alike.
    assert stored["target_scale"][1].tolist() == pytest.approx([1e-6] * 4)
    assert built.restore(built.targets(drawn[0].targets)).isfinite().all()
    assert float(transcoder.target_variance[1]) == pytest.approx(1e-12)


@pytest.mark.parametrize("side", ["input", "target"])
def test_a_run_with_sqrt_d_model_has_a_mean_norm_of_sqrt_d_model(side, tmp_path):
    train = {"steps": 1, "statistics_tokens": 48}
    schedule = {"name": "linear", "warmup_steps": 0}
    chosen = tables(normalisation="sqrt_d_model", train=train, schedule=schedule)
    trained = run(chosen, out=tmp_path / "run")
    source = parts(**chosen).source
    x = torch.cat([getattr(source.next(), f"{side}s") for _ in range(3)])
    for layer in range(3):
        norms = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in x[:, layer].double()]
        scale = sum(norms) / len(norms) / math.sqrt(6)
        assert trained.statistics()[f"{side}_scale"][layer].tolist() == pytest.approx([scale] * 6, rel=1e-6)


@pytest.mark.parametrize("name", ["none", "rms", "mean_std"])
def test_targets_that_never_vary_do_not_outweigh_the_others(name):
    """With a mean that stays (`none`, `rms`) their error was divided by 1e-12."""
    drawn = batches()
    for batch in drawn:
        batch.targets[:, 1] = 5.0
    transcoder = fitted(name, drawn)
    loss = parts(source={"layers": 2, "d_model": 4}, losses=["mse"]).losses
    idle = torch.zeros(transcoder.shape, dtype=torch.int64)
    terms = objective(transcoder, loss, drawn[0], idle, 0.5).terms
    assert 0.1 < float(terms["mse"]) < 20
