"""Statistics and normalisation against plain formulas."""

from __future__ import annotations

import math
import re

import pytest
import torch

from clt_plugins import Batch, CrossLayerTranscoder, Moments, Refused, run
from clt_plugins.model.normaliser import Normaliser, estimate
from tests.support.helpers import parts, random_batch, tables


def batches(mean: float = 3.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for tokens in (5, 17, 30):
        pair = [torch.randn(tokens, 2, 4, generator=generator, dtype=torch.float64) * 2 + mean for _ in range(2)]
        drawn.append(Batch(*pair))
    return drawn


@pytest.mark.parametrize("mean", [3.0, 1e6])
def test_streamed_statistics_are_those_of_all_tokens_together(mean):
    statistics = estimate(batches(mean), 2, 4)
    for side in ("inputs", "targets"):
        x = torch.cat([getattr(batch, side) for batch in batches(mean)])
        torch.testing.assert_close(statistics[f"{side}.mean"], x.mean(0), rtol=1e-12, atol=0)
        # A mean 500,000 times the deviation leaves ten digits of float64 for it.
        torch.testing.assert_close(statistics[f"{side}.std"], x.std(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(statistics[f"{side}.rms"], x.square().mean((0, 2)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean", [3.0, 1e6])
def test_merged_moments_are_those_of_all_tokens(mean):
    halves = Moments(2, 4), Moments(2, 4)
    for moments, some in zip(halves, (batches(mean)[:1], batches(mean)[1:]), strict=True):
        for batch in some:
            moments.add(batch)
    merged = Moments(2, 4)
    for moments in (*halves, Moments(2, 4)):
        merged.merge(moments)
    assert merged.count == 52
    expected = estimate(batches(mean), 2, 4)
    for name, value in merged.statistics().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=0)


def test_statistics_need_two_tokens():
    with pytest.raises(ValueError, match="at least 2 tokens, got 0"):
        Moments(2, 4).statistics()
    one = batches()[0].rows(slice(0, 1))
    with pytest.raises(Refused, match=r"^transcoder\.normalisation_tokens: statistics need at least 2 tokens, got 1"):
        estimate([one], 2, 4)


def normaliser(method: str) -> Normaliser:
    built = Normaliser(2, 4, torch.float64)
    built.fit(method, estimate(batches(), 2, 4))
    return built


@pytest.mark.parametrize("method", ["none", "mean_std", "rms", "sqrt_d_model"])
def test_restoring_undoes_normalising(method):
    built, x = normaliser(method), batches()[2].targets
    torch.testing.assert_close(built.restore(built.targets(x)), x, rtol=1e-12, atol=1e-12)


def test_each_method_does_what_its_name_says():
    x = torch.cat([batch.inputs for batch in batches()])
    torch.testing.assert_close(normaliser("none").inputs(x), x)
    norms = normaliser("sqrt_d_model").inputs(x).norm(dim=-1)
    torch.testing.assert_close(norms.mean(0), torch.full((2,), 2.0, dtype=torch.float64))  # sqrt(4)
    whitened = normaliser("mean_std").inputs(x)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(2, 4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened.std(0), torch.ones(2, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    scaled = normaliser("rms").inputs(x)
    torch.testing.assert_close(scaled.square().mean((0, 2)), torch.ones(2, dtype=torch.float64))


def test_statistics_of_another_shape_or_not_finite_are_refused():
    built, statistics = Normaliser(2, 4), estimate(batches(), 2, 4)
    with pytest.raises(Refused, match=r"^source: statistics inputs\.mean: expected numbers of shape \(2, 4\), got \(3"):
        built.fit("mean_std", statistics | {"inputs.mean": torch.zeros(3, 4)})
    std = torch.ones(2, 4)
    std[1, 2] = torch.nan
    with pytest.raises(Refused, match=r"^source: statistics targets\.std: nan at layer 1, dimension 2; estimate them"):
        built.fit("mean_std", statistics | {"targets.std": std})
    with pytest.raises(Refused, match=r"^source: statistics targets\.std: -1\.0 at layer 0, dimension 0"):
        built.fit("mean_std", statistics | {"targets.std": torch.full((2, 4), -1.0)})


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("side", "name"), [("inputs", "MLP inputs"), ("targets", "MLP outputs")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_activation_that_is_not_finite_is_named_with_layer_dimension_and_type(side, name, number, dtype):
    drawn = [
        Batch(*(getattr(batch, s).to(getattr(torch, dtype)) for s in ("inputs", "targets"))) for batch in batches()
    ]
    getattr(drawn[1], side)[3, 1, 2] = number
    text = (
        rf"^source: an activation of layer 1 is not a finite number in {dtype}: {float(number)} in dimension 2 of its "
        rf"{name}: set model\.dtype = "
    )
    with pytest.raises(Refused, match=text):
        estimate(drawn, 2, 4)


def test_large_numbers_of_float16_are_no_infinity():
    pair = torch.full((2, 2, 4), 60000.0, dtype=torch.float16)
    pair[0] = -60000.0
    statistics = estimate([Batch(pair, pair)], 2, 4)
    assert statistics["inputs.rms"].tolist() == [60000.0, 60000.0]


def test_a_dimension_that_never_varied_is_scaled_like_the_others_of_its_layer():
    drawn = batches()
    for batch in drawn:
        batch.inputs[:, 0, 1] = 0.1
        batch.targets[:, 1] = 7.0
    built = Normaliser(2, 4, torch.float64)
    built.fit("mean_std", estimate(drawn, 2, 4))
    others = torch.cat([batch.inputs for batch in drawn])[:, 0, [0, 2, 3]].std(0)
    expected = others.square().mean().sqrt() + 1e-6
    assert float(built.input_scale[0, 1]) == pytest.approx(float(expected), rel=1e-9)
    x = drawn[0].inputs.clone()
    assert built.inputs(x)[:, 0, 1].abs().max() < 1e-6
    x[:, 0, 1] += expected
    torch.testing.assert_close(built.inputs(x)[:, 0, 1], torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0)
    # A layer that writes a constant: its error and its variance shrink alike.
    assert built.target_scale[1].tolist() == pytest.approx([1e-6] * 4)
    assert built.restore(built.targets(drawn[0].targets)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "index", "number", "told"),
    [
        ("input_scale", (1, 2), 0.0, "0.0 at layer 1, dimension 2"),
        ("target_scale", (0, 3), torch.nan, "nan at layer 0, dimension 3"),
        ("input_scale", (0, 0), -1.0, "-1.0 at layer 0, dimension 0"),
        ("target_shift", (1, 1), torch.inf, "inf at layer 1, dimension 1"),
        ("target_variance", (1,), torch.nan, "nan at layer 1"),
    ],
)
def test_stored_statistics_that_make_no_sense_are_refused_with_the_file(name, index, number, told, tmp_path):
    transcoder = parts().transcoder
    transcoder.normaliser.fit("mean_std", estimate([random_batch(20, 3, 6)], 3, 6))
    transcoder.save(tmp_path / "good")
    assert CrossLayerTranscoder.load(tmp_path / "good").normaliser.input_scale.shape == (3, 6)
    getattr(transcoder.normaliser, name)[index] = number
    transcoder.save(tmp_path / "bad")
    file = tmp_path / "bad/transcoder.safetensors"
    with pytest.raises(Refused, match=rf"^{re.escape(f'{file}: normaliser.{name}: {told}')}"):
        CrossLayerTranscoder.load(tmp_path / "bad")


@pytest.mark.parametrize("side", ["input", "target"])
def test_a_run_with_sqrt_d_model_has_a_mean_norm_of_sqrt_d_model(side, tmp_path):
    chosen = tables(transcoder={"normalisation": "sqrt_d_model", "normalisation_tokens": 48}, train={"steps": 1})
    trained = run({**chosen, "schedule": {"name": "linear", "warmup_steps": 0}}, out=tmp_path / "run")
    source = parts(**chosen).source
    batches = [getattr(source.next(), f"{side}s") for _ in range(3)]
    x = torch.cat(batches)
    for layer in range(3):
        norms = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in x[:, layer].double()]
        scale = sum(norms) / len(norms) / math.sqrt(6)
        assert trained.normaliser.get_buffer(f"{side}_scale")[layer].tolist() == pytest.approx([scale] * 6, rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "scale", "method"), [(0.0, 1.0, "none"), (0.5, 1.0, "mean_std"), (0.0, 2.0, "mean_std")]
)
def test_the_method_of_another_tools_statistics_is_detected(shift, scale, method):
    built = Normaliser(2, 4)
    built.input_shift.fill_(shift)
    built.target_scale.fill_(scale)
    assert built.detect_method() == method
    x = batches()[0].inputs.float()
    assert (built.inputs(x) is x) == (method == "none"), "no copy where nothing changes"
    torch.testing.assert_close(built.inputs(x), x - shift)
    built.reset()
    assert built.detect_method() == "none"


def test_a_batch_must_hold_two_tensors_of_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(3, 2, 4), torch.zeros(3, 2, 5))
