"""From a selection by rank to thresholds: the L0 of every layer on tokens not calibrated on, and what refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder
from clt_plugins.convert import as_table, convert, with_thresholds
from clt_plugins.exits import ExitCode, Stopped
from clt_plugins.metrics import evaluate_batches
from clt_plugins.settings import ConvertConfig
from clt_plugins.setup import Parts
from tests.helpers import parts, plugins, stir

SIZES = {"layers": 3, "d_model": 16, "features": 48, "active": 3.0}
CONFIG = ConvertConfig(tokens=4096, calibration_tokens=8192)


def trained(activation: dict[str, Any], **changes: Any) -> Parts:
    """A transcoder trained for a few steps on sparse ground truth."""
    from clt_plugins.objective import objective
    from clt_plugins.optim import make_optimizer

    made = parts(
        activation=activation,
        source={"name": "synthetic", **SIZES},
        transcoder={"features": 64, "normalisation": "none"},
        train={"batch_tokens": 512, "lr": 1e-2},
        **changes,
    )
    recipe = made.context.recipe
    assert recipe is not None
    optimizer = make_optimizer(made.transcoder, recipe.train, 0)
    idle = torch.zeros(3, 64, dtype=torch.int64)
    for _ in range(60):
        optimizer.zero_grad()
        objective(made.transcoder, made.losses, made.source.next(), idle, 0.0).total.backward()
        optimizer.step()
    return made


@cache
def batchtopk() -> Parts:
    return trained({"name": "batchtopk", "k": 12})


@pytest.mark.parametrize("thresholds", ["feature", "cut", "layer"])
@pytest.mark.parametrize("name", ["batchtopk", "topk", "batchtopk-zscore"])
def test_every_layer_keeps_its_l0_on_other_tokens(name, thresholds):
    base, _, ranking = name.partition("-")
    made = batchtopk() if name == "batchtopk" else trained({"name": base, "k": 12, "ranking": ranking or "raw"})
    config = ConvertConfig(tokens=4096, calibration_tokens=8192, thresholds=thresholds)
    converted, report = convert(made.transcoder, made.source, config, plugins())
    assert converted.choices["activation"].name == "jumprelu"
    assert max(map(abs, report["l0_change"])) < 0.02
    # Measured again, by the ordinary road, on all that is held out.
    batches = list(made.source.held_out(16384))
    before, after = (evaluate_batches(each, batches) for each in (made.transcoder, converted))
    assert (after["l0_by_layer"] / before["l0_by_layer"] - 1).abs().max() < 0.02
    if thresholds != "layer" or ranking:
        assert after["nmse"] < 1.03 * before["nmse"]
    assert len(as_table(report).splitlines()) == 2 + 3


def test_thresholds_are_means_of_the_smallest_selected():
    """Against a count by hand, feature by feature, over the same batches."""
    made = batchtopk()
    state = made.source.state()
    config = ConvertConfig(tokens=4 * 512, calibrate=False, unseen=7.5)
    converted, report = convert(made.transcoder, made.source, config, plugins())
    made.source.load_state(state)
    smallest: dict[tuple[int, int], list[float]] = {}
    for _ in range(4):
        acts = made.transcoder.encode(made.source.next().inputs).dense().detach()
        for layer in range(3):
            for feature in range(64):
                on = acts[:, layer, feature][acts[:, layer, feature] > 0]
                if len(on):
                    smallest.setdefault((layer, feature), []).append(float(on.min()))
    found = converted.activation.threshold()
    for layer in range(3):
        for feature in range(64):
            known = smallest.get((layer, feature))
            wanted = sum(known) / len(known) if known else 7.5
            assert float(found[layer, feature]) == pytest.approx(wanted, rel=1e-5)
    assert report["unseen_features"] == [64 - sum(place[0] == layer for place in smallest) for layer in range(3)]
    assert report["scales"] == [1, 1, 1]


def test_it_is_deterministic_and_shares_the_weights():
    made = batchtopk()
    state = made.source.state()
    first, one = convert(made.transcoder, made.source, CONFIG, plugins())
    made.source.load_state(state)
    second, two = convert(made.transcoder, made.source, CONFIG, plugins())
    assert one == two
    assert torch.equal(first.activation.threshold(), second.activation.threshold())
    assert first.W_enc is made.transcoder.W_enc and first.tying is made.transcoder.tying


def test_it_saves_and_loads(tmp_path):
    made = batchtopk()
    converted, _ = convert(made.transcoder, made.source, CONFIG, plugins())
    converted.save(tmp_path / "out")
    again = CrossLayerTranscoder.load(tmp_path / "out", plugins=plugins())
    x = made.source.next().inputs
    assert torch.allclose(again(x), converted(x), atol=1e-6)


@pytest.mark.parametrize("wanted", [2.0, [1.0, 3.0, 6.0]])
def test_an_l0_can_be_asked_for(wanted):
    made = batchtopk()
    config = ConvertConfig(tokens=4096, calibration_tokens=8192, l0=wanted)
    _, report = convert(made.transcoder, made.source, config, plugins())
    targets = torch.tensor(wanted if isinstance(wanted, list) else [wanted] * 3)
    assert report["calibrated_to"] == targets.tolist()
    assert (torch.tensor(report["after"]["l0"]) / targets - 1).abs().max() < 0.05


def test_a_layer_that_cannot_reach_its_target_is_named():
    made = batchtopk()
    with pytest.raises(Stopped, match=r"layer 1 cannot reach an L0 of 60: it is [\d.]+ with") as stop:
        convert(made.transcoder, made.source, ConvertConfig(tokens=512, l0=[4.0, 60.0, 4.0]), plugins())
    assert stop.value.code == ExitCode.FAILED
    with pytest.raises(Stopped, match=r"layer 0 cannot reach an L0 of 4"):
        convert(made.transcoder, made.source, ConvertConfig(tokens=512, l0=4.0, scales=[5.0, 10.0]), plugins())


def test_what_cannot_be_converted_says_why():
    made = parts(activation={"name": "jumprelu"})
    with pytest.raises(ValueError, match="convert: jumprelu has thresholds already"):
        convert(made.transcoder, made.source, CONFIG, plugins())
    other = parts(source={"name": "synthetic", "layers": 2, "d_model": 6, "features": 24, "active": 2.0})
    with pytest.raises(ValueError, match="gives 2 layers of d_model 6, but the transcoder is for 3 layers"):
        convert(parts().transcoder, other.source, CONFIG, plugins())
    with pytest.raises(ValueError, match=r"convert\.activation: 'relu' takes no thresholds"):
        convert(made_small(), parts().source, ConvertConfig(activation="relu", tokens=64), plugins())
    with pytest.raises(ValueError, match=r"convert\.l0: 2 numbers for 3 layers"):
        convert(made_small(), parts().source, ConvertConfig(l0=[1.0, 2.0], tokens=64), plugins())


def made_small() -> CrossLayerTranscoder:
    made = parts().transcoder
    stir(made)
    return made


def test_thresholds_select_what_passes_them():
    made = made_small()
    thresholds = torch.linspace(0.1, 1.0, 30).view(3, 10)
    converted = with_thresholds(made, thresholds, "jumprelu", plugins())
    x = torch.randn(50, 3, 6, generator=torch.Generator().manual_seed(0))
    pre = torch.einsum("bld,lfd->blf", x, made.W_enc) + made.b_enc
    wanted = torch.where(pre > thresholds, pre, 0)
    assert torch.allclose(converted.encode(x).dense(), wanted, atol=1e-5)
