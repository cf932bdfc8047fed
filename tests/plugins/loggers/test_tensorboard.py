"""The logger `tensorboard`, read by TensorBoard's reader."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from clt_plugins import Context, run
from tests.support.helpers import tables
from tests.support.logged import (
    RECIPE,
    evaluation,
    lines,
    log_steps,
    logger,
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


def hparams(events: EventAccumulator) -> dict[str, HParamsPluginData]:
    found = events.PluginTagToContent("hparams")
    return {tag.split("/")[-1]: HParamsPluginData.FromString(content) for tag, content in found.items()}


def test_runs_are_compared_by_the_recipes_values_and_the_last_held_out_metrics(context, tmp_path):
    found = hparams(finished(context, tmp_path))
    values = found["session_start_info"].session_start_info.hparams
    assert values["activation.k"].number_value == 8
    assert values["losses[1].name"].string_value == "auxk"
    assert values["train.lr"].number_value == 1e-3
    assert values["train.betas"].string_value == "[0.9, 0.999]"
    metrics = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert metrics == ["eval/nmse"], "a curve of the same run"
    assert "session_end_info" in found
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "no run of its own for them"


@pytest.mark.parametrize("torn", [0, 5])
def test_what_an_interrupted_run_logged_beyond_the_checkpoint_is_hidden(context, tmp_path, torn):
    sink = logger("tensorboard", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(2, evaluation(2))
    for step in range(1, 8):
        sink.log(step, {"loss/total": -1.0 if step > 4 else float(step)})
    sink.close("interrupted")
    assert "session_end_info" not in hparams(read_events(tmp_path)), "it may go on"
    if torn:  # a crash in the middle of a record
        (file,) = (tmp_path / "tensorboard").iterdir()
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
    assert "session_end_info" in hparams(events)


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
    assert hparams(events)["session_start_info"].session_start_info.hparams["source.name"].string_value == "synthetic"
