"""Sweeps: each member is the run that it would be alone, bit for bit, whatever happens to the others."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest

from clt_plugins import load_plugins, run, sweep
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.recipe.read import read_sweep
from clt_plugins.training import loop
from clt_plugins.training.sweep.stream import Stream
from clt_plugins.training.sweep.streams import grouped
from tests.support.helpers import plugins
from tests.support.sweeps import alone, assert_same_run, many

ZIP = [["activation.k", "tying"]]
INTERRUPTING = "tests.support.interrupting"


def statuses(root: Path) -> dict[str, str]:
    found = json.loads((root / "frontier.json").read_text())
    return {point["label"]: point["status"] for point in found["members"]}


# -- members are runs ------------------------------------------------------------------------------------------------

EVERYTHING = {
    "losses": [{"name": "mse"}, {"name": "auxk", "k": 3}, {"name": "kl", "contexts": 2, "every": 3}],
    "transforms": [{"name": "noise"}, {"name": "subsample", "share": 0.6}],
    "callbacks": [
        {"name": "active_subspace", "tokens": 100, "dimensions": 5},
        {"name": "resample", "every": 3, "tokens": 40},
        {"name": "ema", "decay": 0.5},
    ],
    "stages": [
        {"name": "convert", "tokens": 64, "calibration_tokens": 64},
        {"name": "evaluate", "tokens": 64, "every": 6},
    ],
}
"""All that reads the source besides training, or keeps a state."""


def test_each_member_is_the_run_alone_bit_for_bit(tmp_path):
    swept = many({"activation.k": [2, 4], "tying": ["untied", "per_source"], "zip": ZIP}, **EVERYTHING)
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    for label in ("k=2,tying=untied", "k=4,tying=per_source"):
        assert_same_run(tmp_path / "sweep" / label, alone(tmp_path / f"alone-{label}", swept, label))


def test_seeds_share_a_stream_where_the_seed_of_the_data_is_one(tmp_path):
    groups = grouped(read_sweep(many({"seed": [1, 2]}), plugins=plugins()).members)
    assert [group.stream for group in groups] == [0, 1]
    swept = many({"seed": [1, 2]}, data_seed=1)
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert {one["stream"] for one in json.loads((tmp_path / "sweep/sweep.json").read_text())["members"]} == {0}
    for label in ("seed=1", "seed=2"):
        assert_same_run(tmp_path / "sweep" / label, alone(tmp_path / label, swept, label))
    # Of seed 1 the seed of the data is no other one.
    own = {key: value for key, value in many({}, seed=1).items() if key != "sweep"}
    run(own, out=tmp_path / "own", plugins=plugins())
    weights = [(tmp_path / name / "transcoder/transcoder.safetensors").read_bytes() for name in ("own", "sweep/seed=1")]
    assert weights[0] == weights[1] != (tmp_path / "sweep/seed=2/transcoder/transcoder.safetensors").read_bytes()


def test_the_source_is_read_once_for_all_that_are_trained_at_a_time(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(Stream, "close", lambda self: read.append(self.batches))
    swept = many({"activation.k": [2, 3, 4]})
    sweep(swept, out=tmp_path / "all", plugins=plugins())
    assert read == [12], "the four that statistics are estimated from are the first four of the steps"
    sweep(swept, out=tmp_path / "two", at_once=2, plugins=plugins())
    assert read[1:] == [12, 12 + 4], "a single member holds no batch for others"
    for label in ("k=2", "k=3", "k=4"):
        assert_same_run(tmp_path / "all" / label, tmp_path / "two" / label)


def test_callbacks_that_look_ahead_do_not_make_batches_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(Stream, "close", lambda self: read.append(self.batches))
    callbacks = [{"name": "resample", "every": 2, "tokens": 32}]
    sweep(many({"activation.k": [1, 2]}, callbacks=callbacks), out=tmp_path / "sweep", plugins=plugins())
    assert read[0] <= 12 + 2, "two batches ahead at the end"


def test_runs_of_different_lengths_and_transforms_go_together(tmp_path):
    few = [{"name": "subsample", "share": 0.4}]
    together = {"train.steps": [6, 12], "transforms": [[], few], "zip": [["train.steps", "transforms"]]}
    swept = many(together)
    assert len(grouped(read_sweep(swept, plugins=plugins()).members)) == 1
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    for member in read_sweep(swept, plugins=plugins()).members:
        assert_same_run(tmp_path / "sweep" / member.label, alone(tmp_path / member.label, swept, member.label))


@pytest.mark.parametrize(
    "key, values", [("train.batch_tokens", [8, 16]), ("source.noise", [0.1, 0.2]), ("seed", [1, 2])]
)
def test_what_changes_the_stream_makes_another_one(key, values):
    groups = grouped(read_sweep(many({key: values, "activation.k": [2, 3]}), plugins=plugins()).members)
    assert [len(group.members) for group in groups] == [2, 2]
    assert len(grouped([one for group in groups for one in group.members], 1)) == 4


# -- what happens to members -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "by"), [("SIGINT", 0), ("SIGINT", 1), ("SIGTERM", 1)])
def test_interrupted_all_are_saved_at_the_same_step_and_go_on_as_if_never_stopped(tmp_path, kind, by):
    """Whichever member has its turn then: `by` is its number."""
    loggers = [[{"name": "jsonl"}], [{"name": "jsonl"}]]
    loggers[by].append({"name": "interrupt", "at": 5, "kind": kind})
    changes = {"train": {"log_every": 1}, "losses": EVERYTHING["losses"], "callbacks": EVERYTHING["callbacks"]}
    broken = many({"activation.k": [2, 4], "loggers": loggers, "zip": [["activation.k", "loggers"]]}, **changes)
    known = load_plugins(extra=[INTERRUPTING])
    with pytest.raises(Stopped, match="interrupted at step 5, 2 checkpoints written") as stop:
        sweep(broken, out=tmp_path / "sweep", plugins=known)
    assert stop.value.code == ExitCode.INTERRUPTED
    labels = [one.label for one in read_sweep(broken, plugins=known).members]
    for label in labels:
        newest = sorted(path.name for path in (tmp_path / "sweep" / label / "checkpoints").iterdir())[-1]
        assert newest == "step_000005"
    # One goes on alone, the other by the sweep.
    whole = many({"activation.k": [2, 4], "train.lr": [0.01], "loggers": [[{"name": "jsonl"}]]}, **changes)
    members = read_sweep(whole, plugins=plugins()).members
    run(members[0].recipe, out=tmp_path / "sweep" / labels[0], resume="latest", plugins=plugins())
    for member, label in zip(members, labels, strict=True):
        shutil.move(tmp_path / "sweep" / label, tmp_path / "sweep" / member.label)
    sweep(whole, out=tmp_path / "sweep", resume=True, plugins=plugins())
    for member in members:
        shutil.rmtree(tmp_path / "sweep" / member.label / "checkpoints/step_000005")
        assert_same_run(tmp_path / "sweep" / member.label, alone(tmp_path / member.label, whole, member.label))


def test_members_at_different_steps_are_resumed_and_new_ones_begin(tmp_path):
    swept = many({"activation.k": [2, 3]})
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    back = tmp_path / "sweep/k=3"
    shutil.rmtree(back / "checkpoints/step_000012")
    shutil.rmtree(back / "transcoder")
    larger = many({"activation.k": [2, 3, 4]})
    sweep(larger, out=tmp_path / "sweep", resume=True, plugins=plugins())
    for label in ("k=2", "k=3", "k=4"):
        assert_same_run(tmp_path / "sweep" / label, alone(tmp_path / label, larger, label))


def test_a_member_that_fails_does_not_end_the_others(tmp_path, caplog):
    labels, ends = ("lr=0.01", "lr=1e+30", "lr=0.02"), ("finished", "failed", "finished")
    swept = many({"train.lr": [0.01, 1e30, 0.02]})
    with pytest.raises(
        Stopped, match=r"1 of 3 members failed, the others are complete: lr=1e.30: .*not finite"
    ) as stop:
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert stop.value.code == ExitCode.GUARD
    assert statuses(tmp_path / "sweep") == {"lr=0.01": "trained", "lr=1e+30": "failed", "lr=0.02": "trained"}
    for label in ("lr=0.01", "lr=0.02"):
        assert_same_run(tmp_path / "sweep" / label, alone(tmp_path / label, swept, label))
    assert not (tmp_path / "sweep/lr=1e+30/transcoder").exists()
    told = {label: json.loads((tmp_path / "sweep" / label / "history.jsonl").read_text())["end"] for label in labels}
    assert {label: end["status"] for label, end in told.items()} == dict(zip(labels, ends, strict=True))
    assert "not finite" in told["lr=1e+30"]["error"]


def test_a_member_that_failed_frees_its_memory(tmp_path, monkeypatch):
    """Its exception was kept, and with it the frames of its step and the transcoder."""
    failed, alive, real = [], [], loop.objective

    def failing(transcoder, *rest):
        if failed and failed[0]() is not transcoder:
            gc.collect()
            alive.append(failed[0]() is not None)
        elif not failed and transcoder.step == 3:
            failed.append(weakref.ref(transcoder))
            raise RuntimeError("no memory left")
        return real(transcoder, *rest)

    monkeypatch.setattr(loop, "objective", failing)
    with pytest.raises(Stopped, match="1 of 2 members failed"):
        sweep(many({"activation.k": [2, 3]}), out=tmp_path / "sweep", plugins=plugins())
    assert len(alive) > 5 and not any(alive)


def test_a_member_that_ends_early_leaves(tmp_path):
    early = {"name": "early_stopping", "metric": "eval/nmse", "patience": 1, "change": 0.5}
    swept = many({"callbacks": [[], [early]]}, train={"eval_every": 2, "steps": 16})
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    steps = {}
    for member in read_sweep(swept, plugins=plugins()).members:
        assert_same_run(tmp_path / "sweep" / member.label, alone(tmp_path / member.label, swept, member.label))
        steps[member.label] = json.loads((tmp_path / "sweep" / member.label / "transcoder/transcoder.json").read_text())
    assert steps["callbacks=early_stopping"]["step"] < steps["callbacks=none"]["step"] == 16


def test_a_source_that_fails_ends_the_sweep(tmp_path, monkeypatch):
    real = Stream.after

    def after(self, state):
        if self.batches == 10:
            self.failure = OSError("the disk is gone")
            raise self.failure
        return real(self, state)

    monkeypatch.setattr(Stream, "after", after)
    with pytest.raises(OSError, match="the disk is gone"):
        sweep(many({"activation.k": [2, 3]}, stages=[]), out=tmp_path / "sweep", plugins=plugins())
