"""Sweeps: each member is the run that it would be alone, bit for bit, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from clt_plugins import Batch, Faults, load_plugins, run, sweep
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode, PluginError, Refused, Stopped
from clt_plugins.model.assemble import build_source
from clt_plugins.recipe.read import as_toml, read_recipe, read_sweep
from clt_plugins.training.sweep import run as sweeps
from clt_plugins.training.sweep import stream as streams
from clt_plugins.training.sweep.stream import Stream
from clt_plugins.training.sweep.streams import grouped
from tests.support.helpers import plugins, recipe, tables

ZIP = [["activation.k", "tying"]]
INTERRUPTING = "tests.support.interrupting"
TIMED = ("time/",)
"""Metrics that no two runs have in common."""


def many(swept: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    rare = {"checkpoint_every": 6, "log_every": 6, "eval_every": 6, **changes.pop("train", {})}
    changed = {"stages": [{"name": "evaluate", "tokens": 64}], "train": rare, **changes}
    return {**tables(**changed), "sweep": dict(swept)}


def assert_same_run(member: Path, alone: Path) -> None:
    """All files have the same bytes, but for when and by which command they were made, and seconds."""
    files = [
        {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (member, alone)
    ]
    # What an interruption has made stays: compare what both have to have.
    for one in files:
        for name in ("history.jsonl", "versions.json"):
            del one[name]
        for name in [name for name in one if name.endswith("metrics.jsonl")]:
            lines = [json.loads(line) for line in one[name].decode().splitlines()]
            one[name] = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]  # type: ignore
    assert files[0].keys() == files[1].keys()
    assert [name for name, content in files[0].items() if content != files[1][name]] == []


def alone(place: Path, swept: Mapping[str, Any], label: str) -> Path:
    """The run of a member, by itself."""
    member = next(one for one in read_sweep(swept, plugins=plugins()).members if one.label == label)
    run(member.recipe, out=place, plugins=plugins())
    return place


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


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_interrupted_all_are_saved_at_the_same_step_and_go_on_as_if_never_stopped(tmp_path, kind):
    loggers = [[{"name": "jsonl"}], [{"name": "jsonl"}, {"name": "interrupt", "at": 5, "kind": kind}]]
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


# -- the stream ------------------------------------------------------------------------------------------------------


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("seed", range(4))
def test_readers_that_go_anywhere_read_what_a_source_alone_gives(seed):
    random = torch.Generator().manual_seed(seed)
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    readers, own = [stream.reader() for _ in range(3)], [build_source(recipe()) for _ in range(3)]
    states: list[list[dict[str, Any]]] = [[] for _ in range(3)]
    for _ in range(150):
        number, what = torch.randint(3, (1,), generator=random).item(), torch.rand(1, generator=random).item()
        if what < 0.75 or not states[number]:
            states[number].append(readers[number].state())
            assert equal(readers[number].next(), own[number].next())
        else:  # back to where it was, as a callback does that has looked ahead
            chosen = states[number][int(torch.randint(len(states[number]), (1,), generator=random))]
            readers[number].load_state(chosen)
            own[number].load_state(chosen)
        assert readers[number].state() == own[number].state()
        assert len(stream.held) <= streams.HELD


def test_in_turns_a_source_is_never_set_back():
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    readers = [stream.reader() for _ in range(3)]
    for _ in range(10):
        assert len({id(reader.next()) for reader in readers}) == 1
    assert stream.batches == 10 and len(stream.held) == 1


def test_a_batch_that_is_changed_in_place_is_refused():
    stream = Stream(build_source(recipe()), torch.device("cpu"))
    first, second = stream.reader(), stream.reader()
    first.next().inputs.add_(1)
    with pytest.raises(PluginError, match="a batch was changed in place"):
        second.next()


def test_a_source_that_draws_from_torch_is_refused_unless_it_has_one_reader():
    source = build_source(recipe())
    real = source.next
    source.next = lambda: (torch.rand(1), real())[1]  # type: ignore[method-assign]
    stream = Stream(source, torch.device("cpu"))
    reader = stream.reader()
    reader.next()
    stream.reader()
    with pytest.raises(Refused, match="draws from torch's own generators"):
        reader.next()


# -- what is refused, and what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "swept, told",
    [
        ({}, "has no setting"),
        ({"name": ["a"]}, "sweep.name: cannot be swept: all members are of one sweep"),
        ({"parallel": ["single"]}, "cannot be swept: all members run in the same processes"),
        ({"activation.k": 3}, "sweep.activation.k: expected a list of values, got 3"),
        ({"activation.k": []}, "expected a list of values"),
        ({"activation.k": [3, 3]}, "has the same value twice"),
        ({"activation.k": [3], "activation": ["relu"]}, "is also set by another key of the sweep"),
        ({"activation.k": [2, "x"]}, 'sweep.activation.k: "x": expected int or float or list of int or float, got "x"'),
        ({"activation.q": [2]}, "sweep.activation.q: 2: unknown key"),
        ({"train.lr": [0.1, -1.0]}, "sweep.train.lr: -1.0: must be > 0"),
        ({"seed": [1, 2], "zip": [["seed", "lr"]]}, 'sweep.zip: "lr" is no setting of the sweep'),
        ({"seed": [1, 2], "train.lr": [0.1], "zip": [["seed", "train.lr"]]}, "as many values each: seed has 2, "),
        ({"seed": list(range(1001))}, "makes 1,001 transcoders, more than 1,000"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_by_its_key(swept, told):
    with pytest.raises(Faults) as refused:
        read_sweep(many(swept), plugins=plugins())
    assert told in str(refused.value) and len(refused.value.faults) == 1


def test_faults_name_file_and_line(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(as_toml(recipe()) + '\n[sweep]\nseed = [1]\n"activation.k" = [2, "x"]\n')
    line = len(file.read_text().splitlines())
    with pytest.raises(Faults) as refused:
        read_sweep(file, plugins=plugins())
    assert str(refused.value).startswith(f"{file}:{line}: sweep.activation.k: ")


def test_products_zips_and_labels():
    def labels(swept: dict[str, Any]) -> list[str]:
        return [one.label for one in read_sweep(many(swept), plugins=plugins()).members]

    assert labels({"activation.k": [2, 3], "seed": [0, 1]}) == ["k=2,seed=0", "k=2,seed=1", "k=3,seed=0", "k=3,seed=1"]
    zipped = {
        "activation": {"k": [2, 3]},
        "train.lr": [0.1, 0.2],
        "seed": [0, 1],
        "zip": [["activation.k", "train.lr"]],
    }
    assert labels(zipped) == ["k=2,lr=0.1,seed=0", "k=2,lr=0.1,seed=1", "k=3,lr=0.2,seed=0", "k=3,lr=0.2,seed=1"]
    tables_ = {"losses": [[{"name": "mse"}], [{"name": "mse"}, {"name": "auxk"}], [{"name": "mse", "weight": 2.0}]]}
    assert labels(tables_) == ["losses=mse", "losses=mse+auxk", "losses=mse-2"]
    assert labels({"losses.mse.weight": [1.0], "losses.auxk.weight": [2.0]}) == ["mse.weight=1.0,auxk.weight=2.0"]


def test_a_member_has_the_recipe_that_set_makes():
    (member,) = read_sweep({**tables(), "sweep": {"activation.k": [3], "seed": [7]}}, plugins=plugins()).members
    by_flags = read_recipe(tables(), ["activation.k=3", "seed=7"], plugins())
    assert as_toml(member.recipe) == as_toml(by_flags)


def test_memory_that_is_too_small_is_refused_before_work_with_what_to_do(tmp_path, monkeypatch):
    swept = read_sweep(many({"activation.k": [2, 3, 4]}), plugins=plugins())
    needs = sweeps.plan_sweep(swept, plugins())
    alone_ = max(one.needs.total_bytes for one in needs.members)
    assert alone_ < needs.total_bytes < sum(one.needs.total_bytes for one in needs.members)
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: needs.total_bytes - 1)
    with pytest.raises(Refused, match=r"train 2 at a time, --at-once 2 \(activations are made 2 times\)"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 1)
    with pytest.raises(Refused, match="not one of its members fits"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())


def test_several_ranks_are_refused_before_a_folder_is_made(tmp_path):
    swept = many({"activation.k": [2, 3]}, parallel={"name": "tensor", "tensor": 2})
    with pytest.raises(Refused, match="parallel: a sweep trains in one process"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()


def test_processes_of_torchrun_are_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refused, match="sweep: trains in one process, and 2 were started: leave out torchrun"):
        sweep(many({"activation.k": [2, 3]}), out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()


def test_lines_and_messages_of_a_console_name_the_member(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "clt_plugins")
    swept = many({"activation.k": [2, 3]}, loggers=["console"])
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert [line.split()[:3] for line in lines] == [[f"k={k}", "step", str(n)] for n in (6, 12) for k in (2, 3)]
    saved = [one.getMessage() for one in caplog.records if "transcoder saved" in one.getMessage()]
    assert [text.split(": ")[0] for text in saved] == ["k=2", "k=3"]


def test_folders_are_not_overwritten(tmp_path):
    swept = many({"activation.k": [2]})
    with pytest.raises(Refused, match="nothing to resume"):
        sweep(swept, out=tmp_path / "sweep", resume=True, plugins=plugins())
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    with pytest.raises(Refused, match="already there: go on with --resume"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_before_its_record_blocks_nothing(tmp_path, resume):
    """Ctrl-C while the members' folders are made leaves some of them, with a lock that nobody holds."""
    swept = many({"activation.k": [2, 3]})
    for name in ("sweep.lock", ".sweep.json.partial", "k=2/run.lock", "k=2/recipe.toml"):
        (tmp_path / "sweep" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / name).touch()
    sweep(swept, out=tmp_path / "sweep", resume=resume, plugins=plugins())
    assert {point["label"] for point in json.loads((tmp_path / "sweep/frontier.json").read_text())["members"]} == {
        "k=2",
        "k=3",
    }


@pytest.mark.parametrize("name", ["mine.txt", "k=2/mine.txt", "other/run.lock"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path, resume, name):
    for path in ("k=2/run.lock", name):
        (tmp_path / "sweep" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / path).touch()
    with pytest.raises(Refused, match="nothing to resume" if resume else "already there"):
        sweep(many({"activation.k": [2]}), out=tmp_path / "sweep", resume=resume, plugins=plugins())
    assert (tmp_path / "sweep" / name).is_file()


def test_commands(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(as_toml(recipe()) + '\n[sweep]\n"activation.k" = [2, 3]\n')
    (tmp_path / "one.toml").write_text(as_toml(recipe()))

    def cli(*arguments: object) -> Any:
        return CliRunner().invoke(main_group, [str(one) for one in arguments])

    done = cli("run", file)
    assert done.exit_code == 2 and "`sweep RECIPE --out DIR` trains them" in done.stderr
    done = cli("sweep", tmp_path / "one.toml", "--out", tmp_path / "sweep")
    assert done.exit_code == 2 and "sweep: missing" in done.stderr
    done = cli("plan", file)
    assert done.exit_code == 0 and "2 transcoders on 1 stream" in done.stdout
    planned = json.loads(cli("plan", file, "--json", "--at-once", 1, "--gpu", "h100").stdout)
    assert planned["passes"] == 2 and planned["fits"] and planned["most_at_once"] == 2
    done = cli("validate", file)
    assert done.stdout.splitlines() == ["2 transcoders", '  k=2: "activation.k" = 2', '  k=3: "activation.k" = 3']
    done = cli("sweep", file, "--out", tmp_path / "sweep", "--set", "sweep.activation.k=[4, 5]")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"k=4", "k=5", "frontier.html", "frontier.png"}
