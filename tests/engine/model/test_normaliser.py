"""Statistics and normalisation against plain formulas."""

from __future__ import annotations

import pytest
import torch

from clt_plugins.data.batch import Batch
from clt_plugins.model.normaliser import Moments, Normaliser, estimate


def batches(mean: float = 3.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for tokens in (5, 17, 30):
        pair = [torch.randn(tokens, 2, 4, generator=generator, dtype=torch.float64) * 2 + mean for _ in range(2)]
        made.append(Batch(*pair))
    return made


@pytest.mark.parametrize("mean", [3.0, 1e6])
def test_streamed_statistics_are_those_of_all_tokens_together(mean):
    found = estimate(batches(mean), 2, 4)
    for side in ("inputs", "targets"):
        x = torch.cat([getattr(batch, side) for batch in batches(mean)])
        torch.testing.assert_close(found[f"{side}.mean"], x.mean(0), rtol=1e-12, atol=0)
        # A mean 500,000 times the deviation leaves ten digits of float64 for it.
        torch.testing.assert_close(found[f"{side}.std"], x.std(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(found[f"{side}.rms"], x.square().mean((0, 2)).sqrt(), rtol=1e-12, atol=0)


def test_statistics_need_two_tokens():
    with pytest.raises(ValueError, match="at least 2 tokens, got 0"):
        Moments(2, 4).statistics()


def normaliser(method: str) -> Normaliser:
    made = Normaliser(2, 4, torch.float64)
    made.fit(method, estimate(batches(), 2, 4))
    return made


@pytest.mark.parametrize("method", ["none", "mean_std", "rms", "sqrt_d_model"])
def test_restoring_undoes_normalising(method):
    made, x = normaliser(method), batches()[2].targets
    torch.testing.assert_close(made.restore(made.targets(x)), x, rtol=1e-12, atol=1e-12)


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
    made, found = Normaliser(2, 4), estimate(batches(), 2, 4)
    with pytest.raises(ValueError, match=r"statistics inputs\.mean: expected finite numbers of shape \(2, 4\)"):
        made.fit("mean_std", found | {"inputs.mean": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"targets\.std"):
        made.fit("mean_std", found | {"targets.std": torch.full((2, 4), torch.nan)})


def test_a_batch_must_hold_two_tensors_of_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(3, 2, 4), torch.zeros(3, 2, 5))
