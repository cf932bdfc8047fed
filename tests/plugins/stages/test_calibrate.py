"""The scale of a target as an order statistic, against counting; and which arithmetic each estimate costs."""

from __future__ import annotations

import pytest
import torch

from clt_plugins.errors import Unreachable
from clt_stages import calibrate as calibration
from clt_stages import thresholds as estimation
from clt_stages.calibrate import calibrate, scale_of
from clt_stages.convert import convert, with_thresholds
from tests.support.helpers import convert_config, parts, random_batch, stir

LOW, HIGH = 0.01, 100.0


def above(ratios: torch.Tensor, scale: float) -> int:
    return int((ratios.double() > scale).sum())


@pytest.mark.parametrize("seed", range(5))
def test_every_count_of_distinct_ratios_is_reached_exactly(seed):
    generator = torch.Generator().manual_seed(seed)
    ratios = (torch.randn(200, generator=generator).exp() + LOW).unique()
    for count in range(len(ratios) + 1):
        scale = scale_of(ratios, count, LOW, HIGH)
        assert LOW <= scale <= HIGH
        assert above(ratios, scale) == count
    assert scale_of(ratios, len(ratios) + 5, LOW, HIGH) == scale_of(ratios, len(ratios), LOW, HIGH)


def test_a_scale_is_halfway_between_its_neighbours():
    ratios = torch.tensor([1.0, 2.0, 8.0])
    assert scale_of(ratios, 1, LOW, HIGH) == pytest.approx(4.0)
    assert scale_of(ratios, 3, 0.25, HIGH) == pytest.approx(0.5), "the lower bound stands in for a neighbour"
    assert scale_of(ratios, 0, LOW, 32.0) == pytest.approx(16.0), "and the upper bound"
    assert scale_of(torch.empty(0), 0, 0.1, 10.0) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_among_equal_ratios_the_nearest_count_is_taken(seed):
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.randint(1, 12, (60,), generator=generator).float().sort().values
    reachable = [above(ratios, scale) for scale in [0.5, *(ratios.unique() + 0.5).tolist()]]
    for count in range(len(ratios) + 1):
        best = min(abs(possible - count) for possible in reachable)
        assert abs(above(ratios, scale_of(ratios, count, LOW, HIGH)) - count) == best


def test_no_scale_is_beyond_the_bounds():
    ratios = torch.tensor([1.0, 2.0, 3.0, 50.0, 60.0])
    for count in range(6):
        scale = scale_of(ratios, count, 0.5, 10.0)
        assert 0.5 <= scale <= 10.0
        assert above(ratios, scale) == max(count, 2), "two are above the upper bound"


def test_a_calibrated_layer_has_its_target_to_the_last_feature():
    """No tolerance is used up: the L0 on the sample is the target, rounded to whole features."""
    built = parts()
    stir(built.transcoder)
    # Of the synthetic source many tokens are alike: their features are 0 and their pre-activations the biases.
    sample = [random_batch(320, 3, 6, seed=seed) for seed in range(2)]
    thresholds = torch.full((3, 10), 0.5)
    targets = [0.7, 1.0, 2.123]
    scales = calibrate(built.transcoder, thresholds, sample, targets, convert_config())
    calibrated = thresholds * scales.float()[:, None]
    converted = with_thresholds(built.transcoder, calibrated, convert_config().activation)
    with torch.no_grad():
        counts = sum(converted.encode(batch.inputs).counts().sum(1) for batch in sample)
    assert counts.tolist() == [round(target * 640) for target in targets]


def test_equal_pre_activations_that_leave_no_scale_near_enough_are_told():
    """All tokens are the same one, so that each feature is active at all of them or at none."""
    built = parts()
    stir(built.transcoder)
    batch = next(iter(built.source.held_out(16))).rows(torch.zeros(16, dtype=torch.int64))
    config = convert_config(scales=[0.001, 1000.0])
    with pytest.raises(Unreachable, match=r"layer 0 cannot reach an L0 of 1\.5: the nearest is [12], further than"):
        calibrate(built.transcoder, torch.full((3, 10), 0.5), [batch], [1.5, 1.5, 1.5], config)


@pytest.mark.parametrize(("thresholds", "encodes_everything"), [("feature", False), ("cut", False), ("layer", True)])
def test_only_the_standardised_estimate_computes_all_pre_activations(thresholds, encodes_everything, monkeypatch):
    calls = []
    original = estimation.pre_activations_of

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(estimation, "pre_activations_of", counted)
    monkeypatch.setattr(calibration, "pre_activations_of", original)
    built = parts()
    stir(built.transcoder)
    config = convert_config(tokens=64, calibration_tokens=64, thresholds=thresholds, calibrate=False)
    convert(built.transcoder, built.source, config)
    assert len(calls) == (4 * 3 if encodes_everything else 0), "4 batches of 3 layers"
