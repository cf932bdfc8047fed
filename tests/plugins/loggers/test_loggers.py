"""What loggers write, read by TensorBoard's reader and by the standard library's JSON."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm

from clt_plugins import Context, Refused, run
from tests.support.helpers import parts, plugins, tables

NAMES = ["tensorboard", "jsonl", "console"]
RECIPE: dict[str, Any] = {
    "name": "small",
    "activation": {"name": "topk", "k": 8},
    "losses": [{"name": "mse", "weight": 1.0}, {"name": "auxk", "weight": 0.5}],
    "train": {"steps": 12, "lr": 1e-3, "betas": [0.9, 0.999], "nesterov": True},
}


@pytest.fixture(scope="module")
def context() -> Context:
    return parts().context


def logger(name: str, context: Context, folder: Path, **settings: Any) -> Any:
    spec = plugins().pick("loggers", name).spec
    return spec.build(spec.config(**settings), attrs.evolve(context, folder=folder))


def metrics(step: int) -> dict[str, Any]:
    """As the engine logs them; every number depends on the step."""
    return {"tokens": 16 * step, "loss/total": 1 / step, "train/nmse_by_layer": torch.tensor([0.5, 0.25]) / step}


def evaluation(step: int, layers: int = 2) -> dict[str, Any]:
    density = torch.full((layers, 6), 1e-3)
    density[0, 0], density[0, 1] = 0.0, 0.1
    nmse = torch.arange(1.0, layers + 1) / 16 / step
    return {"eval/nmse": float(nmse.mean()), "eval/nmse_by_layer": nmse, "eval/density": density}


def log_steps(sink: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.log(step, metrics(step))


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(folder: Path) -> list[Any]:
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    # 0: keep everything.
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in events.Scalars(tag)]


def in_a_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script that finds `logger`, `metrics` and this file's other helpers, with `context` and `folder`."""
    start = (
        "from pathlib import Path\nimport os, resource, signal, sys\nfrom tests.plugins.loggers.test_loggers import *\n"
    )
    given = f"context, folder = parts().context, Path({str(folder)!r})\n"
    command = [sys.executable, "-c", start + given + textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])


# -- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_closing_before_the_start_and_closing_twice_do_no_harm(name, context, tmp_path):
    logger(name, context, tmp_path).close("failed")
    sink = logger(name, context, tmp_path)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 3)
    sink.close("failed")
    sink.close("failed")


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_missing_folder_is_named(name, context, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        logger(name, context, tmp_path / "nowhere").start(RECIPE, 0)


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_run_without_a_folder_is_refused(name, context):
    spec = plugins().pick("loggers", name).spec
    with pytest.raises(Refused, match=f"loggers: {name} needs a folder"):
        spec.build(spec.config(), attrs.evolve(context, folder=None))


@pytest.mark.parametrize(
    ("name", "file", "settings"), [("tensorboard", "events", "flush_seconds=0"), ("jsonl", "metrics", "")]
)
def test_a_full_disk_is_reported_by_the_call_that_meets_it_and_names_the_file(name, file, settings, tmp_path):
    done = in_a_process(
        f"""
        sink = logger({name!r}, context, folder, {settings})
        sink.start(RECIPE, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(1, 1000):
            try:
                sink.log(step, metrics(step))
            except OSError as error:
                print(step, error.filename)
                break
        sink.close("failed")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no thread died with a stack trace"
    step, path = done.stdout.split()
    assert file in Path(path).name
    if name == "jsonl":
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.count("\n") == int(step) - 1, "each line before is there"
    else:
        assert len(scalars(read_events(tmp_path), "loss/total")) >= int(step) - 1


@pytest.mark.parametrize(("name", "settings"), [("tensorboard", "flush_seconds=0"), ("jsonl", "")])
def test_what_was_logged_outlives_a_process_that_dies_without_a_word(name, settings, tmp_path):
    script = f"""
        sink = logger({name!r}, context, folder, {settings})
        sink.start(RECIPE, 0)
        log_steps(sink, 1, 5)
        os._exit(7)
        """
    assert in_a_process(script, tmp_path).returncode == 7
    found = lines(tmp_path) if name == "jsonl" else scalars(read_events(tmp_path), "loss/total")
    assert len(found) == 5


# -- jsonl ------------------------------------------------------------------------------------------------------


def test_each_call_is_a_json_object_with_values_by_layer_as_lists(context, tmp_path):
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(2, metrics(2))
    sink.log(2, evaluation(2) | {"eval/l0": torch.tensor(3.5)})
    sink.close("finished")
    assert lines(tmp_path) == [
        {"step": 2, "tokens": 32, "loss/total": 0.5, "train/nmse_by_layer": [0.25, 0.125]},
        {"step": 2, "eval/nmse": 0.046875, "eval/nmse_by_layer": [0.03125, 0.0625], "eval/l0": 3.5},
    ]


def test_numbers_that_json_does_not_have_are_null(context, tmp_path):
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    by_layer = torch.tensor([1.0, math.nan, -math.inf])
    sink.log(1, {"a": math.nan, "b": math.inf, "c": by_layer, "d": torch.tensor(math.nan)})
    sink.close("failed")
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": [1.0, None, None], "d": None}]


def unbroken(context: Context, folder: Path) -> bytes:
    folder.mkdir()
    sink = logger("jsonl", context, folder)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 8)
    sink.close("finished")
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [0, 1, 2, 30])
def test_the_file_of_a_resumed_run_is_that_of_an_unbroken_one(context, tmp_path, torn):
    whole = unbroken(context, tmp_path / "whole")
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 7)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[: -torn or None])
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 4)
    log_steps(sink, 5, 8)
    sink.close("finished")
    assert file.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "whole"]


@pytest.mark.parametrize("torn", [1, 2, 30])
def test_a_line_torn_by_a_crash_is_mended_even_where_no_step_comes_again(context, tmp_path, torn):
    whole = unbroken(context, tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(whole[:-torn])
    sink = logger("jsonl", context, tmp_path / "run")
    sink.start(RECIPE, 8)
    sink.close("finished")
    # Without its line end the last line is still whole; with less it is gone.
    assert file.read_bytes() == (whole if torn == 1 else b"".join(whole.splitlines(keepends=True)[:7]))


def test_a_crash_while_lines_are_dropped_leaves_the_old_file(context, tmp_path, monkeypatch):
    whole = unbroken(context, tmp_path / "run")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        logger("jsonl", context, tmp_path / "run").start(RECIPE, 3)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == whole
    monkeypatch.undo()
    logger("jsonl", context, tmp_path / "run").start(RECIPE, 3)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("foreign", ["not JSON", "[1, 2]", '{"loss": 1}'])
def test_a_file_that_is_no_log_is_left_alone(context, tmp_path, foreign):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{foreign}\n{{"step": 2}}\n')
    with pytest.raises(Refused, match=r"metrics\.jsonl: line 2 is not one of this log"):
        logger("jsonl", context, tmp_path).start(RECIPE, 1)
    assert foreign in (tmp_path / "metrics.jsonl").read_text()


# -- tensorboard ------------------------------------------------------------------------------------------------


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


# -- console ----------------------------------------------------------------------------------------------------

LOGGED = {"tokens": 32000, "loss/total": 0.43211, "optim/lr": 1e-3, "time/tokens_per_s": 4096.4, "loss/mse": 0.4}
HELD_OUT = {"tokens": 32000, "eval/nmse": 0.1234567, "eval/l0": 31.96, "eval/dead_fraction": 0.0123}


def squeezed(text: str) -> list[str]:
    return [re.sub(r" +", " ", line) for line in text.splitlines()]


def test_a_line_for_training_and_one_for_evaluation_without_columns_that_are_absent(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(500, LOGGED)
    sink.log(500, HELD_OUT | {"eval/nmse_by_layer": torch.ones(3)})
    out, err = capsys.readouterr()
    assert out == "", "stdout is for results"
    assert squeezed(err) == [
        "step 500 tokens 32,000 loss 0.4321 lr 0.001 tokens/s 4,096",
        "step 500 tokens 32,000 held-out NMSE 0.1235 L0 31.96 dead 1.2%",
    ]


def test_columns_can_be_chosen(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path, metrics=["loss/mse", "train/nmse_by_layer", "eval/density"])
    sink.start(RECIPE, 0)
    sink.log(1, LOGGED | metrics(2) | evaluation(2))
    sink.log(2, {"tokens": 3})
    assert squeezed(capsys.readouterr().err) == ["step 1 loss/mse 0.4 train/nmse_by_layer [0.25 0.125]"]


def test_lines_stand_aligned_below_each_other(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    sink.log(1, LOGGED)
    sink.log(20000, LOGGED | {"tokens": 1_280_000, "loss/total": 0.1})
    first, second = capsys.readouterr().err.splitlines()
    assert [m.start() for m in re.finditer("[a-z/]+ ", first)] == [m.start() for m in re.finditer("[a-z/]+ ", second)]


def test_a_progress_bar_is_lifted_out_of_the_way(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    with tqdm(total=10, file=sys.stderr, mininterval=0, ncols=60) as bar:
        bar.update(3)
        sink.log(3, LOGGED)
        bar.update(3)
    shown = capsys.readouterr().err
    assert re.search(r"\rstep +3   tokens[^\r]*4,096\n", shown), "on a line of its own"
    assert "60%" in shown.split("4,096\n")[1], "and the bar goes on below"
