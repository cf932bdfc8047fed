"""Statistics and normalisation against plain formulas."""

from __future__ import annotations

import pytest
import torch

from clt_plugins import Batch, Moments, Refused
from clt_plugins.model.normaliser import Normaliser, estimate


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
    for name, value in estimate(batches(mean), 2, 4).items():
        torch.testing.assert_close(merged.statistics()[name], value, rtol=1e-9, atol=0)


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
    torch.testing.assert_close(normaliser("sqrt_d_model").inputs(x), x * 2)  # sqrt(4)
    whitened = normaliser("mean_std").inputs(x)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(2, 4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened.std(0), torch.ones(2, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    scaled = normaliser("rms").inputs(x)
    torch.testing.assert_close(scaled.square().mean((0, 2)), torch.ones(2, dtype=torch.float64))


def test_statistics_of_another_shape_or_not_finite_are_refused():
    built, statistics = Normaliser(2, 4), estimate(batches(), 2, 4)
    with pytest.raises(Refused, match=r"^source: statistics inputs\.mean: expected finite numbers of shape \(2, 4\)"):
        built.fit("mean_std", statistics | {"inputs.mean": torch.zeros(3, 4)})
    with pytest.raises(Refused, match=r"^source: statistics targets\.std: .* got NaN or infinite ones$"):
        built.fit("mean_std", statistics | {"targets.std": torch.full((2, 4), torch.nan)})


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
