"""The logger `tensorboard`, read by TensorBoard's reader."""

from __future__ import annotations

import io
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.backend_context import Context as Comparison
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from clt_plugins import Context, run
from tests.support.helpers import tables
from tests.support.logged import (
    RECIPE,
    evaluation,
    lines,
    log_steps,
    logger,
    metrics,
    read_events,
    scalars,
)


def finished(context: Context, folder: Path, **settings: Any) -> EventAccumulator:
    sink = logger("tensorboard", context, folder, **settings)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 3)
    sink.log(3, evaluation(3, layers=12))
    sink.close("finished")
    return read_events(folder)


def test_tensorboards_reader_finds_the_curves_whatever_waits_at_the_end(context, tmp_path):
    events = finished(context, tmp_path, flush_seconds=1e9)
    assert scalars(events, "loss/total") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert scalars(events, "tokens") == [(1, 16), (2, 32), (3, 48)]
    assert scalars(events, "eval/nmse") == [(3, pytest.approx(6.5 / 48))], "once: the comparison of runs adds no point"


def test_values_by_layer_are_curves_that_sort_by_layer_apart_for_training_and_evaluation(context, tmp_path):
    events = finished(context, tmp_path)
    by_layer = [tag for tag in sorted(events.Tags()["scalars"]) if tag.startswith("eval_nmse_by_layer/")]
    assert by_layer == [f"eval_nmse_by_layer/{layer:02}" for layer in range(12)]
    values = [scalars(events, tag)[-1] for tag in by_layer]
    assert values == [(3, pytest.approx((layer + 1) / 48)) for layer in range(12)]
    assert scalars(events, "train_nmse_by_layer/01") == [(s, pytest.approx(0.25 / s)) for s in (1, 2, 3)]
    folds = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert folds == {"tokens", "loss", "eval", "eval_nmse_by_layer", "train_nmse_by_layer"}


def test_densities_are_histograms_of_their_logarithm_without_features_that_were_never_active(context, tmp_path):
    events = finished(context, tmp_path)
    assert sorted(events.Tags()["histograms"]) == [f"eval_density_log10_by_layer/{layer:02}" for layer in range(12)]
    first = events.Histograms("eval_density_log10_by_layer/00")[0]
    assert first.step == 3
    # Of six features one is dead, one active at a tenth of the tokens and four at a thousandth.
    assert (first.histogram_value.num, first.histogram_value.max) == (5, pytest.approx(-1))
    assert first.histogram_value.min == pytest.approx(-3)
    assert first.histogram_value.sum == pytest.approx(-13)
    assert sum(first.histogram_value.bucket) == 5


def test_other_values_by_feature_are_histograms_as_they_are_and_without_any_there_is_none(context, tmp_path):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(
        1, {"train/norms": torch.tensor([[1.0, 2.0, math.nan], [math.nan] * 3]), "eval/density": torch.zeros(2, 3)}
    )
    sink.close("failed")
    events = read_events(tmp_path)
    assert events.Tags()["histograms"] == ["train_norms_by_layer/00"]
    assert events.Histograms("train_norms_by_layer/00")[0].histogram_value.sum == 3


def test_numbers_that_are_not_finite_are_shown(context, tmp_path):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(1, {"loss/total": math.nan, "optim/grad_norm": math.inf, "train/nmse_by_layer": torch.tensor([math.nan])})
    sink.close("failed")
    events = read_events(tmp_path)
    assert math.isnan(scalars(events, "loss/total")[0][1])
    assert scalars(events, "optim/grad_norm") == [(1, math.inf)]
    assert math.isnan(scalars(events, "train_nmse_by_layer/00")[0][1])


def test_the_recipe_is_there_as_toml(context, tmp_path):
    (text,) = finished(context, tmp_path).Tensors("recipe/text_summary")
    block = re.fullmatch(r"```toml\n(.*)```", text.tensor_proto.string_val[0].decode(), re.DOTALL)
    assert block is not None
    assert tomllib.loads(block[1]) == RECIPE


def hparams(folder: Path) -> dict[str, HParamsPluginData]:
    found = compared(folder).PluginTagToContent("hparams")
    return {tag.split("/")[-1]: HParamsPluginData.FromString(content) for tag, content in found.items()}


def compared(folder: Path) -> EventAccumulator:
    """What the comparison of runs reads."""
    events = EventAccumulator(str(folder / "tensorboard/hparams"))
    events.Reload()
    return events


def test_runs_are_compared_by_the_recipes_values_and_the_last_held_out_metrics(context, tmp_path):
    finished(context, tmp_path)
    found = hparams(tmp_path)
    values = found["session_start_info"].session_start_info.hparams
    assert values["activation.k"].number_value == 8
    assert values["losses.auxk.weight"].number_value == 0.5
    assert values["train.lr"].number_value == 1e-3
    assert values["train.betas"].string_value == "[0.9, 0.999]"
    assert "session_end_info" in found
    scores = compared(tmp_path)
    assert scores.Tags()["scalars"] == ["held_out/nmse"], "every curve here is a column"
    assert [(one.step, one.value) for one in scores.Scalars("held_out/nmse")] == [(3, pytest.approx(6.5 / 48))]


def test_tensorboard_compares_the_settings_of_all_runs_those_that_differ_first(context, tmp_path):
    """TensorBoard's own backend, on two runs of different recipes, one of which has not ended."""
    for name, k in (("one", {"k": 8}), ("other", {"k": 4, "scope": "layer"})):
        (tmp_path / name).mkdir()
        sink = logger("tensorboard", context, tmp_path / name)
        sink.start({**RECIPE, "activation": {"name": "topk", **k}}, 0)
        sink.log(1, {**metrics(1), **evaluation(1), "eval/l0": 8.0})
        sink._flush()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    backend = Comparison(TBContext(data_provider=provider))
    request = RequestContext()
    content = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(request, "", True, content, [])
    infos = {info.name: info for info in experiment.hparam_infos}
    assert next(iter(infos)) == "activation.k" and infos["activation.k"].differs
    assert "activation.scope" in infos, "a setting that only one of them has"
    assert not infos["train.lr"].differs
    assert sorted(info.name.tag for info in experiment.metric_infos) == ["held_out/l0", "held_out/nmse"]


# -- pages, table, figures ---------------------------------------------------------------------------------------------


def pages(events: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    """The last layout: the patterns of each chart, by page and title."""
    assert events.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    proto = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {page.title: {chart.title: list(chart.multiline.tag) for chart in page.chart} for page in proto.category}


def test_there_is_a_page_for_each_layer_and_each_chart_finds_its_curves(context, tmp_path):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 2)
    sink.log(2, evaluation(2, layers=2))
    sink.log(3, {"mine/thing_by_layer": torch.ones(2)})
    sink.close("finished")
    events = read_events(tmp_path)
    found = pages(events)
    assert list(found) == ["all layers", "layer 00", "layer 01"]

    def curves(page: str, chart: str) -> list[str]:
        (pattern,) = found[page][chart]
        return sorted(tag for tag in events.Tags()["scalars"] if re.match(pattern, tag))

    assert list(found["layer 01"]) == ["NMSE", "mine/thing_by_layer"]
    assert curves("layer 01", "NMSE") == ["eval_nmse_by_layer/01", "train_nmse_by_layer/01"]
    assert curves("layer 01", "mine/thing_by_layer") == ["mine_thing_by_layer/01"]
    both = [f"{group}_nmse_by_layer/0{layer}" for group in ("eval", "train") for layer in range(2)]
    assert curves("all layers", "NMSE") == both
    assert len(events.Tensors("custom_scalars__config__")) == 2, "written when there is a new metric, not at each step"


def report(layers: int = 2) -> dict[str, Any]:
    """As the stage `evaluate` logs it."""
    return {
        "evaluate/nmse": 0.25,
        "evaluate/l0": 12.5,
        "evaluate/dead_fraction": 0.125,
        "evaluate/nmse_by_layer": torch.tensor([0.125, math.nan]),
        "evaluate/l0_by_layer": torch.tensor([4.5, 8.0]),
        "evaluate/dead_fraction_by_layer": torch.tensor([0.25, 0.0]),
        "evaluate/density": torch.rand(layers, 50),
        "evaluate/threshold": torch.rand(layers, 50),
        "evaluate/ce_recovered": 0.94,
    }


def texts(events: EventAccumulator) -> dict[str, str]:
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")]
    assert all(events.SummaryMetadata(tag).plugin_data.plugin_name == "text" for tag in tags)
    return {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags
    }


def test_the_last_scores_are_a_table(context, tmp_path):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(2, evaluation(2))
    sink.log(3, report())
    sink.close("finished")
    assert texts(read_events(tmp_path))["scores"].splitlines() == [
        "| layer | NMSE | L0 | dead features |",
        "| --- | ---: | ---: | ---: |",
        "| 0 | 0.125 | 4.5 | 25.00% |",
        "| 1 | - | 8 | 0.00% |",
        "| all | 0.25 | 12.5 | 12.50% |",
        "",
        "|  |  |",
        "| --- | ---: |",
        "| evaluate/ce_recovered | 0.94 |",
    ]


def test_figures_are_drawn_when_the_run_ends_and_only_then(context, tmp_path):
    sink = logger("tensorboard", context, tmp_path, flush_seconds=0.0)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 2)
    sink.log(3, report())
    assert not read_events(tmp_path).Tags()["images"]
    sink.close("finished")
    events = read_events(tmp_path)
    names = ["figures/density", "figures/l0_by_layer", "figures/nmse_by_layer", "figures/thresholds"]
    assert sorted(events.Tags()["images"]) == names
    for name in names:
        (image,) = events.Images(name)
        assert image.step == 3
        with PIL.Image.open(io.BytesIO(image.encoded_image_string)) as picture:
            assert picture.size == (image.width, image.height) == (700, 400)
            assert len(picture.convert("RGB").getcolors(2**20)) > 20, "something is drawn"


def test_without_matplotlib_a_note_says_what_is_missing(context, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(3, report())
    sink.close("finished")
    events = read_events(tmp_path)
    assert not events.Tags()["images"]
    assert "pip install 'clt-plugins[plots]'" in texts(events)["figures"]


@pytest.mark.parametrize("torn", [0, 5])
def test_what_an_interrupted_run_logged_beyond_the_checkpoint_is_hidden(context, tmp_path, torn):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(2, evaluation(2))
    for step in range(1, 8):
        sink.log(step, {"loss/total": -1.0 if step > 4 else float(step)})
    sink.close("interrupted")
    assert "session_end_info" not in hparams(tmp_path), "it may go on"
    if torn:  # a crash in the middle of a record
        (file,) = (tmp_path / "tensorboard").glob("events.*")
        file.write_bytes(file.read_bytes()[:-torn])
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 4)
    for step in range(5, 9):
        sink.log(step, {"loss/total": float(step)})
    sink.log(8, evaluation(8))
    sink.close("finished")
    events = read_events(tmp_path)
    assert scalars(events, "loss/total") == [(step, float(step)) for step in range(1, 9)]
    assert [step for step, _ in scalars(events, "eval/nmse")] == [2, 8]
    assert "session_end_info" in hparams(tmp_path)


def test_tensorboards_reader_finds_a_real_runs_metrics(tmp_path):
    run(tables(loggers=[{"name": "tensorboard"}, {"name": "jsonl"}]), out=tmp_path / "run")
    events = read_events(tmp_path / "run")
    expected = {"loss/total", "loss/mse", "eval/nmse", "eval/l0", "eval/dead_fraction", "optim/lr", "time/tokens_per_s"}
    assert expected <= set(events.Tags()["scalars"])
    assert {f"eval_nmse_by_layer/{layer:02}" for layer in range(3)} <= set(events.Tags()["scalars"])
    assert "eval_density_log10_by_layer/02" in events.Tags()["histograms"]
    logged = [
        (line["step"], pytest.approx(line["eval/nmse"])) for line in lines(tmp_path / "run") if "eval/nmse" in line
    ]
    assert scalars(events, "eval/nmse") == logged
    assert (
        hparams(tmp_path / "run")["session_start_info"].session_start_info.hparams["source.name"].string_value
        == "synthetic"
    )
