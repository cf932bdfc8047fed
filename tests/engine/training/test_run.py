"""Whole runs: what they write, how they stop, and that they go on as if they had never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.files.folders import read_tensors
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.recipe.read import as_toml, read_recipe
from clt_plugins.registry.plugins import load_plugins
from clt_synthetic.source import Synthetic
from tests.support.commands import python
from tests.support.helpers import ACTIVATIONS, TYINGS, parts, recipe, stir, tables

INTERRUPTING = "tests.support.interrupting"


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return read_tensors(checkpoint / "transcoder.safetensors") | read_tensors(checkpoint / "training.safetensors")


def assert_bit_identical(one: Path, other: Path) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    states = [json.loads((place / "training.json").read_text()) for place in (one, other)]
    assert states[0] == states[1], "step, tokens and the source's place in the data"


def cli(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return python("-m", "clt_plugins", *arguments, **options)


def test_a_run_writes_what_is_promised(tmp_path):
    run(tables(loggers=[{"name": "tensorboard"}, {"name": "jsonl"}, {"name": "console"}]), out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"recipe.toml", "versions.json", "metrics.jsonl", "tensorboard", "checkpoints", "transcoder"}
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_000004",
        "step_000008",
        "step_000012",
    ]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = {key for line in lines for key in line}
    assert seen >= {"step", "tokens", "loss/total", "eval/nmse", "eval/l0", "eval/dead_fraction"}
    assert lines[-1]["step"] == 12 and lines[-1]["tokens"] == 12 * 16
    versions = json.loads((tmp_path / "run/versions.json").read_text())
    assert versions["plugins"]["activations"].startswith("clt-plugins")
    again = read_recipe(tmp_path / "run/recipe.toml", plugins=load_plugins())
    assert as_toml(again) == (tmp_path / "run/recipe.toml").read_text()


def test_training_lowers_the_held_out_error(tmp_path):
    run(tables(train={"steps": 200, "lr": 3e-2, "eval_every": 100}), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    nmse = [line["eval/nmse"] for line in lines if "eval/nmse" in line]
    assert nmse[-1] < nmse[0] < 0.7, "the zero predictor has 1"


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("seed", range(4))
def test_interrupted_at_a_random_step_and_resumed_it_is_as_if_never_stopped(tmp_path, kind, seed):
    at = random.Random(f"{seed}{kind}").randrange(1, 12)
    losses = [{"name": "mse"}, {"name": "auxk"}]
    whole = tables(losses=losses)
    run(whole, out=tmp_path / "whole")
    broken = tables(losses=losses, loggers=[{"name": "interrupt", "at": at, "kind": kind}], train={"log_every": 1})
    with pytest.raises(Stopped) as stop:
        run(broken, out=tmp_path / "broken", plugins=load_plugins(extra=[INTERRUPTING]))
    assert stop.value.code == ExitCode.INTERRUPTED == 130
    assert f"step_{at:06}" in {path.name for path in (tmp_path / "broken/checkpoints").iterdir()}
    run(whole, out=tmp_path / "broken", resume="latest")
    assert_bit_identical(tmp_path / "whole/checkpoints/step_000012", tmp_path / "broken/checkpoints/step_000012")


def test_killed_at_a_step_and_resumed_it_is_as_if_never_stopped(tmp_path):
    run(tables(), out=tmp_path / "whole")
    (tmp_path / "whole.toml").write_text(as_toml(recipe()))
    killing = recipe_text(loggers=[{"name": "interrupt", "at": 7, "kind": "SIGKILL"}], train={"log_every": 1})
    (tmp_path / "broken.toml").write_text(killing)
    died = cli("run", str(tmp_path / "broken.toml"), "--out", str(tmp_path / "broken"), "-p", INTERRUPTING)
    assert died.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "broken/checkpoints").glob("step_*")] == ["step_000004"]
    done = cli("run", str(tmp_path / "whole.toml"), "--out", str(tmp_path / "broken"), "--resume")
    assert done.returncode == 0, done.stderr
    assert_bit_identical(tmp_path / "whole/checkpoints/step_000012", tmp_path / "broken/checkpoints/step_000012")
    finals = [read_tensors(tmp_path / name / "transcoder/transcoder.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def recipe_text(**changes) -> str:
    return as_toml(read_recipe(tables(**changes), plugins=load_plugins(extra=[INTERRUPTING])))


def test_ctrl_c_from_the_command_line_exits_130_in_one_line(tmp_path):
    (tmp_path / "r.toml").write_text(recipe_text(loggers=[{"name": "interrupt", "at": 6}], train={"log_every": 1}))
    done = cli("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "-p", INTERRUPTING)
    assert done.returncode == 130
    assert "interrupted at step 6, checkpoint written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_with_exit_3_naming_step_and_layer(tmp_path):
    (tmp_path / "r.toml").write_text(as_toml(recipe(train={"lr": 1e30, "steps": 40, "checkpoint_every": 1})))
    done = cli("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "not finite" in last and "step" in last and "layer" in last
    places = list((tmp_path / "run/checkpoints").glob("step_*"))
    assert places
    for place in places:
        assert all(torch.isfinite(x).all() for x in everything(place).values() if x.is_floating_point())


NAN_GRADIENT = '''
import os
import signal

from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """No settings."""

class Loss:
    needs_pre = False

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        zero = forward.features.values.sum() * 0
        return {"root": zero.sqrt() if forward.step == 3 else zero}

@hookimpl
def clt_losses():
    return [Spec("root", Config, lambda config, context: Loss())]

class Saves:
    every = 4

    def after(self, run, step):
        run.checkpoint()

class Interrupts:
    every = 4

    def after(self, run, step):
        os.kill(os.getpid(), signal.SIGINT)

@hookimpl
def clt_callbacks():
    made = {"saves": Saves, "interrupts": Interrupts}
    return [Spec(name, Config, lambda config, context, cls=cls: cls()) for name, cls in made.items()]
'''
"""A loss that is the root of 0 in the fourth step: finite, with a gradient that is NaN. Callbacks that save then, and
that send what Ctrl-C sends, for which a checkpoint is written too."""


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    """Of a step that neither logs nor clips: the checkpoint was written, and called good."""
    (tmp_path / "root_of_zero.py").write_text(NAN_GRADIENT)
    known = load_plugins(extra=[str(tmp_path / "root_of_zero.py")])
    losses = [{"name": "mse"}, {"name": "root"}]
    for asked_by, every, callbacks in (
        ("the recipe", 4, []),
        ("a callback", 100, [{"name": "saves"}]),
        ("Ctrl-C", 100, [{"name": "interrupts"}]),
    ):
        train = {"checkpoint_every": every, "log_every": 6, "eval_every": 12}
        chosen = tables(losses=losses, callbacks=callbacks, train=train)
        with pytest.raises(Stopped, match=r"step 4: loss or gradient not finite .* there is no checkpoint yet"):
            run(chosen, out=tmp_path / asked_by, plugins=known)
        assert not list((tmp_path / asked_by / "checkpoints").glob("step_*"))


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path):
    (tmp_path / "r.toml").write_text(as_toml(recipe(train={"steps": 8})))
    assert cli("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")).returncode == 0
    (tmp_path / "more.toml").write_text(as_toml(recipe(train={"steps": 12})))
    largest = max(path.stat().st_size for path in (tmp_path / "run/checkpoints/step_000008").iterdir())
    arguments = ("run", str(tmp_path / "more.toml"), "--out", str(tmp_path / "run"), "--resume")
    full = cli(*arguments, limits={"FSIZE": largest // 2}, ignored=[signal.SIGXFSZ])
    assert full.returncode == 1
    assert "step_000012: could not be written" in full.stderr and "Traceback" not in full.stderr
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_000004", "step_000008"]
    assert cli(*arguments).returncode == 0, "with room again it goes on from the checkpoint before"


def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_offered(tmp_path):
    run(tables(), out=tmp_path / "run")
    file = tmp_path / "run/checkpoints/step_000012/training.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step_000012/training\.safetensors: truncated.*--resume step_000008"):
        run(tables(train={"steps": 16}), out=tmp_path / "run", resume="latest")
    run(tables(train={"steps": 16}), out=tmp_path / "run", resume="step_000008")


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    run(tables(), out=tmp_path / "run")
    with pytest.raises(ValueError, match="already there: go on with --resume"):
        run(tables(), out=tmp_path / "run")


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    run(tables(), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"transcoder\.features: differs from the run .*it was 10, now it is 11"):
        run(tables(transcoder={"features": 11}), out=tmp_path / "run", resume="latest")


def test_the_metrics_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path):
    run(tables(), out=tmp_path / "whole")
    stopping = [{"name": "jsonl"}, {"name": "interrupt", "at": 8}]
    with pytest.raises(Stopped):
        run(tables(loggers=stopping), out=tmp_path / "broken", plugins=load_plugins(extra=[INTERRUPTING]))
    run(tables(), out=tmp_path / "broken", resume="latest")

    def lines(name: str) -> list[dict[str, object]]:
        text = (tmp_path / name / "metrics.jsonl").read_text()
        timed = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in timed]

    assert lines("whole") == lines("broken")


@pytest.mark.parametrize("activation, tying", [(a, "untied-skip") for a in ACTIVATIONS] + [("topk", t) for t in TYINGS])
def test_a_saved_transcoder_loads_the_same(tmp_path, activation, tying):
    built = parts(activation=ACTIVATIONS[activation], tying=TYINGS[tying])
    transcoder = built.transcoder.eval()
    stir(transcoder)
    batch = built.source.next()
    fit_to_batches(transcoder, [built.source.next() for _ in range(4)])
    transcoder.save(tmp_path / "t")
    loaded = CrossLayerTranscoder.load(tmp_path / "t")
    assert (loaded.n_layers, loaded.d_model, loaded.n_features) == (3, 6, 10)
    with torch.no_grad():
        assert torch.equal(loaded(batch.inputs), transcoder(batch.inputs))
        assert torch.equal(loaded.encode(batch.inputs).dense(), transcoder.encode(batch.inputs).dense())
        # A dense decode adds the same numbers in another order.
        again = loaded.decode(loaded.encode(batch.inputs).dense(), batch.inputs)
        torch.testing.assert_close(again, loaded(batch.inputs), rtol=1e-5, atol=1e-5)


def test_a_folder_that_is_no_transcoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a transcoder"):
        CrossLayerTranscoder.load(tmp_path)


def test_activations_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected activations of shape \[tokens, 3, 6\], got \[4, 3, 7\]"):
        parts().transcoder(torch.zeros(4, 3, 7))


def test_a_missing_model_folder_is_one_line(tmp_path):
    text = as_toml(recipe()).replace("[source]", '[model]\npath = "no/such/model"\n\n[source]')
    start, end = text.index("[source]"), text.index("[transcoder]")
    text = text[:start] + '[source]\nname = "stream"\n\n' + text[end:]
    (tmp_path / "r.toml").write_text(text)
    done = cli("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert "no/such/model" in done.stderr and "Traceback" not in done.stderr


def test_folders_of_the_user_among_the_checkpoints_are_left_alone(tmp_path):
    kept = tmp_path / "run/checkpoints/step_best"
    broken = tables(loggers=[{"name": "interrupt", "at": 5, "kind": "SIGINT"}], train={"log_every": 1})
    with pytest.raises(Stopped):
        run(broken, out=tmp_path / "run", plugins=load_plugins(extra=[INTERRUPTING]))
    kept.mkdir()
    (kept / "note").write_text("mine")
    run(tables(), out=tmp_path / "run", resume="latest")
    assert (kept / "note").read_text() == "mine"


@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_a_number_of_the_source_that_is_not_finite_has_a_remedy_of_its_own(tmp_path, monkeypatch, side):
    """A lower learning rate would not help."""
    made = Synthetic._batch

    def with_inf(self, part, number):
        batch = made(self, part, number)
        if (part, number) == ("train", 5):
            getattr(batch, side)[3, 1, 2] = float("inf")
        return batch

    monkeypatch.setattr(Synthetic, "_batch", with_inf)
    with pytest.raises(Stopped) as caught:
        run(tables(train={"statistics_tokens": 16}), out=tmp_path / "run")
    said = str(caught.value)
    assert f"first in the source's {side} at layer 1; " in said
    assert 'set model.dtype = "float32"' in said and "train.lr" not in said
