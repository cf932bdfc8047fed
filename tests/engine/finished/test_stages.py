"""Train, convert, evaluate and export in one run; and the commands that do each alone, with their errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode, Unreachable
from clt_plugins.recipe.read import as_toml
from clt_plugins.toml import toml_text
from tests.support.helpers import plugins, recipe, tables

STAGES = {
    "convert": {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05},
    "evaluate": {"tokens": 256},
    "exports": [
        {"name": "circuit-tracer", "model_name": "none"},
        {
            "format": {"name": "circuit-tracer", "model_name": "none", "dtype": "bfloat16"},
            "folder": "circuit-tracer.2",
        },
        {"name": "safetensors"},
    ],
    "loggers": [{"name": "tensorboard"}, {"name": "jsonl"}],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(**STAGES), out=folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run that only trained."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(), out=folder)
    return folder


def test_one_run_trains_converts_evaluates_and_exports(whole):
    converted = CrossLayerTranscoder.load(whole / "converted", plugins=plugins())
    assert converted.choices["activation"].name == "jumprelu"
    assert json.loads((whole / "converted/convert.json").read_text()).keys() >= {"before", "after", "scales"}
    report = json.loads((whole / "evaluation/evaluation.json").read_text())
    assert report["tokens"] == 256 and report["model"] is None, "this source has no language model"
    exports = sorted(path.name for path in (whole / "exports").iterdir())
    assert exports == ["circuit-tracer", "circuit-tracer.2", "safetensors"]
    x = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0))
    again = CrossLayerTranscoder.load(whole / "exports/circuit-tracer", plugins=plugins())
    assert torch.allclose(again(x), converted(x), atol=1e-5)


# What validate cannot know, since it builds nothing; and what it can.
BUILT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "takes none": (
        {"convert": {"activation": "relu"}},
        ["stages[0].activation: 'relu' takes no thresholds: choose one that does, such as jumprelu"],
    ),
    "number of layers": (
        {"convert": {"l0": [1.0, 2.0]}},
        ["stages[0].l0: 2 numbers for 3 layers: give one for each, or one for all"],
    ),
    "language model": (
        {"evaluate": {"model_tokens": 100}},
        ["stages[0].model_tokens: the source has no language model for the transcoder to stand in for: set it to 0"],
    ),
    "all at once": (
        {
            "convert": {"activation": "relu", "l0": [1.0]},
            "evaluate": {"model_tokens": 1},
        },
        [
            "stages[0].l0: 1 numbers for 3 layers",
            "stages[0].activation: 'relu' takes no thresholds",
            "stages[1].model_tokens: ",
        ],
    ),
}
READ: dict[str, tuple[dict[str, Any], str]] = {
    "thresholds already": (
        {"activation": {"name": "jumprelu"}, "convert": {}},
        "stages[0]: jumprelu has thresholds already, there is nothing to convert: leave it out",
    ),
    "thresholds of zero": (
        {"activation": {"name": "relu"}, "convert": {}},
        "stages[0]: relu has thresholds already, there is nothing to convert: leave it out",
    ),
    "unknown": (
        {"convert": {"activation": "jumpre"}},
        "stages[0].activation: unknown name 'jumpre', did you mean 'jump",
    ),
    "more than features": ({"convert": {"l0": [1, 2, 11]}}, "stages[0].l0: 11 is more than the 10 features of a layer"),
    "number of layers": (
        {"convert": {"l0": [1, 2]}, "model": {"path": "x", "layers": [0, 1, 2]}},
        "stages[0].l0: 2 numbers for 3 layers: give one for each, or one for all",
    ),
    "not positive": ({"convert": {"l0": [1, 0, 2]}}, "stages[0].l0: must be > 0, for every layer: [1.0, 0.0, 2.0]"),
}


def write(folder: Path, **changes: Any) -> Path:
    """A recipe as a file, unchecked."""
    file = folder / "recipe.toml"
    file.write_text(toml_text(tables(**changes)))
    return file


def refused(commands: list[list[Any]], recipe: Path, texts: list[str], *, loads_a_model: bool = False) -> None:
    """Each command ends with 2, and each line is a fault: the recipe's file and line, and a text that begins so.

    The line is where the recipe writes the setting, or else the head of its table; there is none for a setting's
    default, whose table is not in the file.
    """
    written = recipe.read_text().splitlines()
    for command in commands:
        done = invoke(*command)
        assert done.exit_code == ExitCode.USAGE, done.output
        lines = done.stderr.strip().splitlines()
        if loads_a_model:  # which prints lines of transformers' own
            lines = [line for line in lines if line.startswith(str(recipe))]
        for line, text in zip(lines, texts, strict=True):
            number, _, rest = line.removeprefix(f"{recipe}:").partition(": ")
            assert rest.startswith(text), done.stderr
            table, _, key = text.partition(":")[0].partition(".")
            assert re.match(rf"{key} = |\[+{table.partition('[')[0]}(\.{key})?\]", written[int(number) - 1]), (
                done.stderr
            )


@pytest.mark.parametrize("case", BUILT)
def test_what_would_make_a_stage_fail_is_said_before_training(case, tmp_path):
    changes, texts = BUILT[case]
    file = write(tmp_path, **changes)
    out = tmp_path / "run"
    refused([["run", file, "--out", out], ["run", file, "--dry-run"], ["plan", file]], file, texts)
    assert not out.exists(), "nothing is left behind"


@pytest.mark.parametrize("case", READ)
def test_and_by_validate_where_the_recipe_tells(case, tmp_path):
    changes, text = READ[case]
    file = write(tmp_path, **changes)
    refused([["validate", file], ["run", file, "--out", tmp_path / "run"]], file, [text])


@pytest.mark.parametrize("stage", ["convert", "evaluate", "training alone"])
def test_a_source_that_holds_out_nothing_is_refused_before_training(stage, tmp_path):
    from tests.support.language_models import save_model, save_text

    save_model(tmp_path / "model")
    save_text(tmp_path / "text.jsonl", 200)
    source = {"name": "stream", "text": str(tmp_path / "text.jsonl"), "context": 32, "held_out": 0.0}
    stages: dict[str, Any] = {} if stage == "training alone" else {stage: {}}
    file = write(tmp_path, model={"path": str(tmp_path / "model")}, source=source, **stages)
    commands = [["run", file, "--out", tmp_path / "run"], ["run", file, "--dry-run"]]
    refused(
        commands if stages else commands[:1],
        file,
        [f"source.held_out: no held-out text in '{tmp_path}/text.jsonl' at a share of 0: raise"],
        loads_a_model=True,
    )
    assert not (tmp_path / "run").exists()


EXPORTER = """
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''Picky.'''

class Picky:
    def check(self, transcoder):
        name = transcoder.choices["activation"].name
        kind = "thresholds" if hasattr(transcoder.activation, "threshold") else "ranks"
        return [f"activation: {name} has {kind}", f"tying: {transcoder.choices['tying'].name} is not to my taste"]

    def export(self, transcoder, folder):
        raise AssertionError

@hookimpl
def clt_exporters():
    return [Spec("picky", Config, lambda config, context: Picky())]
"""


def test_an_exporter_of_any_plugin_is_asked_about_the_transcoder_as_it_will_be(distributions, tmp_path):
    distributions.module("picky_exporter", EXPORTER)
    for changes, text in (({}, "batchtopk has ranks"), ({"convert": {}}, "jumprelu has thresholds")):
        file = write(tmp_path, exports=[{"name": "safetensors"}] * bool(changes) + [{"name": "picky"}], **changes)
        setting = f"stages[{2 * len(changes)}].format"
        texts = [f"{setting}: activation: {text}", f"{setting}: tying: untied is not to my taste"]
        command = ["run", file, "-p", "picky_exporter", "--out", tmp_path / "run"]
        refused([command, ["plan", file, "-p", "picky_exporter"]], file, texts)


def test_an_evaluation_is_shown_by_tensorboard(whole):
    (events,) = (whole / "evaluation/tensorboard").glob("events.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    report = json.loads((whole / "evaluation/evaluation.json").read_text())
    (nmse,) = shown.Scalars("evaluate/nmse")
    assert nmse.step == 12 and nmse.value == pytest.approx(report["nmse"])
    tags = shown.Tags()
    assert "evaluate_nmse_by_layer/02" in tags["scalars"]
    assert any("density" in tag for tag in tags["histograms"])


def test_a_layer_that_cannot_be_calibrated_ends_the_run_and_leaves_no_half(tmp_path):
    impossible = tables(convert={**STAGES["convert"], "l0": 9.9})
    with pytest.raises(Unreachable, match="layer 0 cannot reach"):
        run(impossible, out=tmp_path / "run")
    assert (tmp_path / "run/transcoder/transcoder.json").is_file()
    assert not list((tmp_path / "run").glob("*converted*")) and not list((tmp_path / "run").glob(".conv*"))
    # The recipe may be changed, and the run goes on where it was: training is over, the stages come.
    run(tables(**STAGES), out=tmp_path / "run", resume="latest")
    assert (tmp_path / "run/converted/transcoder.json").is_file()


def test_commands_do_the_same_one_by_one(plain, tmp_path):
    changes = [f"--set=stages.convert.{key}={value}" for key, value in STAGES["convert"].items()]
    found = invoke("convert", plain, "--out", tmp_path / "converted", *changes, "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert len(report["after"]["l0"]) == 3
    assert "->" in invoke("convert", plain, "--out", tmp_path / "again", *changes).stdout

    found = invoke("evaluate", plain, "--json", "--set", "stages.evaluate.tokens=256")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["l0"] == 5, "k of the trained one"
    assert json.loads((plain / "evaluation/evaluation.json").read_text())["l0"] == 5
    given = ["--recipe", plain / "recipe.toml"]
    found = invoke("evaluate", tmp_path / "converted", *given, "--out", tmp_path / "report")
    assert found.exit_code == 0 and "NMSE" in found.stdout
    assert (tmp_path / "report/evaluation.json").is_file()

    out = tmp_path / "exported"
    settings = ["--set", "model_name=x", "--set", "dtype=bfloat16"]
    found = invoke("export", tmp_path / "converted", "--format", "circuit-tracer", "--out", out, *settings)
    assert found.exit_code == 0, found.output
    found = invoke("evaluate", out, *given, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["tokens"] > 0, "another tool's folder is judged too"


def test_the_converted_transcoder_of_a_run_is_the_one_that_counts(whole, tmp_path):
    assert invoke("export", whole, "--format", "safetensors", "--out", tmp_path / "out").exit_code == 0


def test_a_skip_path_to_circuit_tracer_is_one_line(tmp_path):
    run(tables(tying={"name": "untied", "skip": True}, activation={"name": "jumprelu"}), out=tmp_path / "run")
    command = ["export", tmp_path / "run", "--format", "circuit-tracer", "--set", "model_name=x"]
    found = invoke(*command, "--out", tmp_path / "out")
    assert found.exit_code == ExitCode.USAGE
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("tying.skip: circuit-tracer folders hold no skip path")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_faults_of_commands_are_one_line(plain, whole, tmp_path):
    def refused(code: ExitCode, text: str, *arguments: object) -> None:
        found = invoke(*arguments)
        assert found.exit_code == code, found.output
        lines = [line for line in found.stderr.strip().splitlines() if not line.startswith("the transcoder in")]
        assert text in lines[-1] and len(lines) == 1, found.stderr

    out = ["--out", tmp_path / "out"]
    refused(
        ExitCode.USAGE,
        "activation: batchtopk has no thresholds, and safetensors needs them",
        "export",
        plain,
        "--format",
        "safetensors",
        *out,
    )
    refused(ExitCode.USAGE, "unknown name 'saelen', did you mean", "export", plain, "--format", "saelen", *out)
    refused(ExitCode.USAGE, "dtype", "export", plain, "--format", "saelens", "--set", "dtype=int4", *out)
    refused(ExitCode.USAGE, "already there", "export", plain, "--format", "saelens", "--out", plain)
    refused(ExitCode.FAILED, "layer 0 cannot reach", "convert", plain, *out, "--set", "stages.convert.l0=9.9")
    thresholds = ["convert", whole / "converted", *out]
    refused(ExitCode.USAGE, "stages.convert: jumprelu has thresholds already, there is nothing to convert", *thresholds)
    one = ["top-activations", plain, "--features", "0:0", "--out", tmp_path / "out"]
    commands = (["evaluate", plain, *out], ["convert", plain, *out], one)
    for layers, d_model in ((2, 6), (3, 8)):
        other = {"name": "synthetic", "layers": layers, "d_model": d_model, "features": 24, "active": 2.0}
        (tmp_path / "other.toml").write_text(as_toml(recipe(source=other)))
        text = f"s {layers} layers of d_model {d_model}, but the transcoder is for 3 layers of d_model 6: name the"
        for command in commands:
            refused(ExitCode.USAGE, text, *command, "--recipe", tmp_path / "other.toml")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))
