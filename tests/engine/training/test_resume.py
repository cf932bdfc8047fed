"""What may differ when a run is resumed: content is compared, not spelling."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import save_file

from clt_plugins import FREE_ON_RESUME, read_recipe, recipe_data, run
from clt_plugins.errors import Faults, Refused, Stopped
from clt_plugins.files.folders import read_tensors
from clt_plugins.model import paths
from clt_plugins.recipe.changes import changes
from clt_plugins.recipe.read import as_toml
from clt_plugins.registry.plugins import load_plugins
from tests.support.helpers import plugins, recipe, tables

MODEL = Path(__file__).parents[3] / "examples/models/stdlib-gpt2"
PLUGINS = ["tests.support.interrupting", "tests.support.drawing"]
DRAWING = [{"name": "mse"}, {"name": "drawing"}]


def end(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints/step_000012/transcoder.safetensors")


def assert_same_end(one: Path, other: Path) -> None:
    first, second = end(one), end(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def stopped(folder: Path, at: int = 6, **changed) -> None:
    loggers = [{"name": "interrupt", "at": at}]
    train = {"log_every": 1, **changed.pop("train", {})}
    with pytest.raises(Stopped):
        run(tables(loggers=loggers, train=train, **changed), out=folder, plugins=load_plugins(extra=PLUGINS))


def resumed(folder: Path, accept: tuple[str, ...] = (), **changed) -> None:
    run(tables(**changed), out=folder, resume="latest", accept=accept, plugins=load_plugins(extra=PLUGINS))


# -- content -----------------------------------------------------------------------------------------------------------


def file_source(file: Path, **settings) -> dict[str, object]:
    return {"name": "file", "file": str(file), **settings}


def test_moved_data_go_on_and_other_data_are_refused_by_name(tmp_path):
    for name, text in (("a", "one"), ("copy", "one"), ("other", "two")):
        (tmp_path / name).write_text(text)
    run(tables(source=file_source(tmp_path / "a")), out=tmp_path / "whole", plugins=load_plugins(extra=PLUGINS))
    stopped(tmp_path / "run", source=file_source(tmp_path / "a"))
    with pytest.raises(Faults, match=r"source\.file: its content is not that of .*--accept source\.file"):
        resumed(tmp_path / "run", source=file_source(tmp_path / "other"))
    (tmp_path / "a").write_text("two")
    with pytest.raises(Faults, match=r"source\.file: its content is not that of"):
        resumed(tmp_path / "run", source=file_source(tmp_path / "a"))
    resumed(tmp_path / "run", source=file_source(tmp_path / "copy", threads=4))
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_other_data_that_are_accepted_are_read_from_their_beginning_and_on_record(tmp_path, caplog):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    stopped(tmp_path / "run", source=file_source(tmp_path / "one"))
    resumed(tmp_path / "run", ("source.file",), source=file_source(tmp_path / "two"))
    assert "reads other data than the run" in caplog.text
    state = json.loads((tmp_path / "run/checkpoints/step_000012/training.json").read_text())
    assert state["source"] == {"count": 6, "key": sum(b"two")}, "the last 6 of 12 steps"
    last = json.loads((tmp_path / "run/history.jsonl").read_text().splitlines()[-1])
    assert last["accepted"] == ["source.file"]
    assert last["changed"]["source.file"] == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_where_and_how_fast_is_free(tmp_path):
    run(tables(), out=tmp_path / "whole")
    stopped(tmp_path / "run")
    resumed(tmp_path / "run", kernels="torch", transcoder={"path": "sparse"}, train={"eval_every": 3}, name="other")
    # Other kernels add the same float32 numbers in another order.
    whole, other = end(tmp_path / "whole"), end(tmp_path / "run")
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


JUMPRELU, TOPK = {"name": "jumprelu", "threshold": 0.2}, {"name": "topk", "k": 4}


@pytest.mark.parametrize(
    ("activation", "before", "path", "dense"),
    [(JUMPRELU, "auto", "sparse", False), (JUMPRELU, "sparse", "dense", True), (TOPK, "dense", "auto", False)],
)
def test_another_path_is_taken_on_resume(activation, before, path, dense, tmp_path, monkeypatch):
    """It was accepted, and the run went on as it had begun: jumprelu dense to the end."""
    stopped(tmp_path / "run", activation=activation, transcoder={"path": before})
    ran = []
    real = paths.dense
    monkeypatch.setattr(paths, "dense", lambda *args: ran.append(torch.is_grad_enabled()) or real(*args))
    resumed(tmp_path / "run", activation=activation, transcoder={"path": path})
    assert any(ran) == dense, "in training; evaluations may be either"


STREAM = {"name": "stream", "text": "python-stdlib", "context": 32, "buffer_tokens": 64}


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("transcoder", {"device": "cuda:1"}),
        ("model", {"device": "cuda"}),
        ("source", {"model_batch": 3}),
        ("source", {"buffer_device": "cuda"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_devices_and_the_size_of_a_pass_are_free(table, values):
    """They change no number: a run goes on with them elsewhere, or after it ran out of memory."""
    whole = tables(source=STREAM, model={"path": str(MODEL)})
    before = recipe_data(read_recipe(whole, plugins=plugins()))
    now = read_recipe({**whole, table: {**whole.get(table, {}), **values}}, plugins=plugins())
    (found,) = changes(before, now)
    assert found.setting == f"{table}.{next(iter(values))}" and found.free


@pytest.mark.parametrize(
    ("changed", "setting", "before", "now"),
    [
        ({"activation": {"k": 4}}, "activation.k", "5", "4"),
        ({"activation": {"anneal_over": 0.5}}, "activation.anneal_over", "0.8", "0.5"),
        ({"activation": {"name": "relu"}}, "activation.name", '"batchtopk"', '"relu"'),
        ({"losses": [{"name": "mse", "weight": 2.0}]}, r"losses\[0\].weight", "1.0", "2.0"),
        ({"losses": [{"name": "mse"}, {"name": "auxk"}]}, "losses", r"\[{name", r"\[{name"),
        ({"schedule": {"name": "linear", "warmup_steps": 3}}, "schedule.warmup_steps", "not set", "3"),
        ({"schedule": "cosine"}, "schedule.name", '"linear"', '"cosine"'),
        ({"optimizer": "adamw"}, "optimizer.name", '"adam"', '"adamw"'),
        ({"optimizer": {"name": "adam", "states": "bf16"}}, "optimizer.states", '"fp32"', '"bf16"'),
        ({"train": {"dead_after_tokens": 32}}, "train.dead_after_tokens", "64", "32"),
        ({"train": {"schedule_steps": 20}}, "train.schedule_steps", "12", "20"),
        ({"train": {"batch_tokens": 32}}, "train.batch_tokens", "16", "32"),
        ({"seed": 1}, "seed", "0", "1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_changes_what_is_computed_is_refused_with_both_values(
    tmp_path_factory, half, changed, setting, before, now
):
    with pytest.raises(Faults, match=rf"^{setting}: differs .*it was {before}.*, now it is {now}.*--accept {setting}"):
        resumed(half, **changed)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A run that was stopped at step 6 of 12. Refused starts leave it as it is."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(folder)
    return folder


def test_what_is_accepted_goes_on_with_the_new_value(tmp_path):
    stopped(tmp_path / "run")
    resumed(tmp_path / "run", ("activation",), activation={"k": 4, "anneal_from": 1.0})
    now = tomllib.loads((tmp_path / "run/recipe.toml").read_text())
    assert now["activation"]["k"] == 4


# -- steps -------------------------------------------------------------------------------------------------------------


def test_fewer_steps_than_are_done_are_refused_also_if_accepted(half):
    for accept in ((), ("train.steps",), ("train",)):
        with pytest.raises(Faults, match=r"train\.steps: 5, but 6 steps are done"):
            resumed(half, accept, train={"steps": 5})


def test_more_steps_go_on_at_the_end_of_the_schedule_and_nothing_that_follows_from_steps_changes(tmp_path, caplog):
    changed = {"train": {"steps": 12, "dead_after_tokens": None}}
    run(tables(**changed), out=tmp_path / "run")
    before = tomllib.loads((tmp_path / "run/recipe.toml").read_text())["train"]
    caplog.clear()
    resumed(tmp_path / "run", train={"steps": 200, "dead_after_tokens": None})
    after = tomllib.loads((tmp_path / "run/recipe.toml").read_text())["train"]
    assert after == {**before, "steps": 200, "schedule_steps": 12}
    for line in (
        "train.schedule_steps: stays 12, as the run had it; by the new settings it would be 200",
        "train.dead_after_tokens: stays",
    ):
        assert line in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["optim/lr"] for line in lines if "optim/lr" in line}
    # Linear falls to a tenth.
    assert all(rates[step] == pytest.approx(1e-3) for step in rates if step > 12) and rates[12] > 1e-3
    # A third start keeps it too.
    caplog.clear()
    resumed(tmp_path / "run", train={"steps": 204, "dead_after_tokens": None})
    assert tomllib.loads((tmp_path / "run/recipe.toml").read_text())["train"]["schedule_steps"] == 12


@pytest.mark.parametrize("accept", ["train.steps", "train.schedule_steps"])
def test_a_schedule_over_more_steps_is_accepted_by_name(tmp_path, accept):
    run(tables(), out=tmp_path / "run")
    resumed(tmp_path / "run", (accept,), train={"steps": 24})
    after = tomllib.loads((tmp_path / "run/recipe.toml").read_text())["train"]
    assert "schedule_steps" not in after
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["optim/lr"] for line in lines if "optim/lr" in line}
    # Two steps of warm-up, then linear to a tenth over 22: step 16 is the 14th of them, counted from 0.
    assert rates[16] == pytest.approx(1e-2 * (1 - 0.9 * 13 / 22))


# -- versions of plugins -----------------------------------------------------------------------------------------------


def test_a_new_setting_with_its_default_and_a_setting_that_is_gone_change_nothing():
    before = tomllib.loads(as_toml(recipe()))
    del before["activation"]["anneal_over"]
    before["activation"]["gone"] = 3
    before["source"]["gone"] = {"a": [1]}
    assert changes(before, recipe()) == []
    (change,) = changes(before, recipe(activation={"anneal_over": 0.5}))
    assert (change.setting, change.before, change.now, change.free) == ("activation.anneal_over", None, 0.5, False)


def test_settings_of_plugins_are_free_where_they_say_so():
    @attrs.frozen(kw_only=True)
    class Config:
        slow: int = attrs.field(default=1, metadata=FREE_ON_RESUME)
        other: int = 1

    typed = recipe()
    typed = attrs.evolve(typed, source=attrs.evolve(typed.source, config=Config(slow=2, other=2)))
    before = {**tomllib.loads(as_toml(recipe())), "source": {"name": "synthetic", "slow": 1, "other": 1}}
    assert [(one.setting, one.free) for one in changes(before, typed)] == [
        ("source.slow", True),
        ("source.other", False),
    ]


# -- generators --------------------------------------------------------------------------------------------------------


def test_draws_of_plugins_from_torchs_own_generator_go_on(tmp_path):
    run(tables(losses=DRAWING), out=tmp_path / "whole", plugins=load_plugins(extra=PLUGINS))
    stopped(tmp_path / "run", losses=DRAWING)
    torch.manual_seed(99)
    resumed(tmp_path / "run", losses=DRAWING)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "tensor", "number", "text"),
    [
        # An infinite scale makes inputs of zeros, of which training does not complain.
        ("transcoder", "normaliser.input_scale", torch.inf, "normaliser.input_scale: inf at layer 0, dimension 0"),
        ("training", "exp_avg_sq/W_enc", torch.inf, "exp_avg_sq of encoder.W_enc: not finite"),
        ("training", "step of encoder.W_enc", torch.nan, "step of encoder.W_enc: not finite"),
    ],
)
def test_a_checkpoint_with_numbers_that_are_none_is_refused(half, tmp_path, file, tensor, number, text):
    shutil.copytree(half, tmp_path / "run")
    checkpoint = max((tmp_path / "run/checkpoints").iterdir())
    path = checkpoint / f"{file}.safetensors"
    tensors = read_tensors(path)
    tensors[tensor].view(-1)[0] = number
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match=re.escape(f"{path}: {text}")):
        resumed(tmp_path / "run")


def test_torch_generators_go_on_where_they_stood_though_plugins_draw_as_they_start(tmp_path):
    """A callback and a logger, before the first step of each process."""
    known = load_plugins(extra=PLUGINS)
    chosen = tables(losses=DRAWING, callbacks=[{"name": "drawing"}], loggers=[{"name": "drawing"}])
    run(chosen, out=tmp_path / "whole", plugins=known)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    run(chosen, out=tmp_path / "resumed", plugins=known, resume="step_000004")
    assert_same_end(tmp_path / "whole", tmp_path / "resumed")
