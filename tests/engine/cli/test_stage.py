"""The command `stage`: any stage with a finished transcoder, in the run's folder or another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.cli.main import main_group
from tests.support.helpers import plugins, tables


def stage(*arguments):
    return CliRunner().invoke(main_group, ["stage", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(evaluate={"tokens": 256}), out=folder)
    return folder


def test_it_writes_into_the_run(trained, tmp_path):
    whole = shutil.copytree(trained, tmp_path / "run")
    done = stage("evaluate", whole, "--set", "tokens=128", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == 128
    assert json.loads((whole / "evaluation/evaluation.json").read_text())["tokens"] == 128


def test_the_result_of_a_checkpoint_is_beside_those_of_training(trained, tmp_path):
    whole = shutil.copytree(trained, tmp_path / "run")
    before = (whole / "evaluation/evaluation.json").read_bytes()
    assert stage("evaluate", whole / "checkpoints/step_000008", "--set", "tokens=128").exit_code == 0
    assert json.loads((whole / "stages/step_000008/evaluation/evaluation.json").read_text())["tokens"] == 128
    assert (whole / "evaluation/evaluation.json").read_bytes() == before
    assert len(list(whole.glob("evaluation*"))) == 1


def test_settings_are_those_of_the_recipe(trained, tmp_path):
    assert json.loads(stage("evaluate", trained, "--out", tmp_path / "new", "--json").stdout)["tokens"] == 256
    done = stage("export", trained, "--set", "format=safetensors", "--out", tmp_path / "export")
    assert "batchtopk has no thresholds" in done.stderr and not (tmp_path / "export").exists()


def test_a_transcoder_that_a_stage_returns_is_saved(trained, tmp_path):
    settings = ("--set", "tokens=512", "--set", "calibration_tokens=512", "--set", "tolerance=0.5")
    assert stage("convert", trained, "--out", tmp_path / "new", *settings).exit_code == 0
    assert CrossLayerTranscoder.load(tmp_path / "new", plugins=plugins()).choices["activation"].name == "jumprelu"


def test_a_transcoder_alone_needs_a_folder_for_the_result(trained, tmp_path):
    alone = shutil.copytree(trained / "transcoder", tmp_path / "alone")
    recipe = ("--recipe", trained / "recipe.toml")
    done = stage("evaluate", alone, *recipe)
    assert done.exit_code == 2 and "is in no run: name a folder for the result" in done.stderr
    done = stage("evaluate", alone, *recipe, "--out", tmp_path / "new", "--set", "tokens=64", "--json")
    assert json.loads(done.stdout)["tokens"] == 64


@pytest.mark.parametrize(
    "name, setting, text",
    [
        ("evaluat", "tokens=1", "unknown name 'evaluat', did you mean 'evaluate'"),
        ("evaluate", "token=1", "unknown"),
        ("evaluate", "model_tokens=5", "the source has no language model"),
        ("evaluate", "tokens=0", "must be > 0"),
    ],
)
def test_faults_are_one_line(name, setting, text, trained, tmp_path):
    done = stage(name, trained, "--set", setting, "--out", tmp_path / "new")
    assert done.exit_code == 2 and text in done.stderr and not (tmp_path / "new").exists()
