"""Whole runs: several ranks train what one process does, also resumed on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clt_plugins import read_recipe, recipe_data, run, toml_text
from clt_plugins.errors import Faults, PluginError
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.recipe.changes import changes
from clt_plugins.recipe.read import as_toml, read_usable_recipe
from clt_plugins.training.saved.checkpoint import TrainingState
from clt_plugins.training.saved.resume import Before
from tests.support.commands import on_ranks
from tests.support.helpers import plugins, recipe, tables

RANKS = {"adam": "tensor", "rowwise_adam": "tensor", "muon": "data", "adafactor": "data"}


def settings(optimizer: Any, **changes: Any) -> dict[str, Any]:
    train = {"steps": 8, "schedule_steps": 8, "clip_norm": 0.5, **changes.pop("train", {})}
    return tables(optimizer=optimizer, train=train, losses=["mse", "auxk"], loggers=[], **changes)


@pytest.mark.parametrize("name", ["rowwise_adam", "muon", "adafactor"])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    chosen = settings(name)
    whole = run(chosen, out=tmp_path / "whole")
    run(settings(name, train={"steps": 4}), out=tmp_path / "parts")
    resumed = run(chosen, out=tmp_path / "parts", resume="latest")
    for key, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_end_as_one_process(name: str, tmp_path: Path) -> None:
    whole = run(settings(name), out=tmp_path / "one")
    split = {"name": "tensor", "tensor": 2 if RANKS[name] == "tensor" else 1, "data": 2 if RANKS[name] == "data" else 1}
    for steps, extra in ((4, ()), (8, ("--resume",))):
        file = tmp_path / f"{steps}.toml"
        file.write_text(as_toml(read_recipe(settings(name, parallel=split, train={"steps": steps}))))
        for done in on_ranks(2, "-m", "clt_plugins", "run", file, "--out", tmp_path / "two", *extra):
            assert done.returncode == 0, done.stderr[-2000:]
    two = SlicedTensors.find(tmp_path / "two" / "transcoder", "transcoder")
    for key, value in whole.tensors().items():
        # Sums over ranks have another order; Adam's first steps amplify the last digits of gradients near 0.
        torch.testing.assert_close(two.read(key), value, rtol=1e-4, atol=1e-5, msg=key)
    # The second half on one process, from what two have saved.
    run(settings(name, train={"steps": 12}), out=tmp_path / "two", resume="latest")


def test_moments_are_cut_like_the_parameter_and_counts_are_not(tmp_path: Path) -> None:
    names = ("rowwise_adam", "adafactor")
    for name in names:
        run(settings(name, train={"steps": 1}), out=tmp_path / name)
    rows, factored = (
        {key: tuple(value.shape) for key, value in load_file(path).items()}
        for path in (tmp_path / name / "checkpoints/step_000001/training.safetensors" for name in names)
    )
    assert rows["exp_avg/W_dec.01"] == (10, 2, 6)
    assert rows["exp_avg_sq/W_dec.01"] == (10, 2, 1)
    assert rows["exp_avg_sq/W_enc"] == (3, 10, 1)
    assert rows["exp_avg_sq/b_enc"] == (3, 10)
    assert rows["step of tying.weight"] == ()
    assert factored["row_var/W_dec.01"] == (10, 2, 1)
    assert factored["col_var of tying.weight"] == (1, 6)
    assert factored["col_var of encoder.W_enc"] == (3, 1, 6)


FORGETFUL = '''
import torch
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """Keeps what no checkpoint can hold."""

class Keeps(torch.optim.SGD):
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"past": [1, 2]}

class Maker:
    def make(self, weights):
        return MADE

    def state_bytes(self, weight):
        return 0

@hookimpl
def clt_optimizers():
    return [Spec("mine", Config, lambda config, context: Maker())]
'''
PARAMETERS = "[w.parameter for w in weights]"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (f"Keeps({PARAMETERS})", r"optimizer\.name: its state 'past' of encoder\.W_enc is list: keep tensors or numb"),
        (f"torch.optim.SGD({PARAMETERS}[1:])", r"every weight must be in one group of the optimizer: encoder\.W_enc"),
        ("3", r"make must return a torch\.optim\.Optimizer, got 3"),
    ],
)
def test_what_would_be_lost_is_refused_in_the_first_step(distributions: Any, tmp_path: Path, made: str, text: str):
    distributions.install("clt-mine", "1.0", {"mine": FORGETFUL.replace("MADE", made)})
    with pytest.raises((Faults, PluginError), match=text):
        run(settings("mine"), out=tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_what_an_older_run_has_written_is_read_with_settings_where_they_stand_now(tmp_path: Path) -> None:
    older = {**recipe_data(recipe()), "optimizer": None, "schedule": None, "normalisation": None}
    older["train"] |= {"optimizer": "adamw", "betas": [0.9, 0.99], "schedule": "linear_final20", "warmup_steps": 3}
    older["transcoder"] |= {"normalisation": "rms"}
    text = toml_text({key: value for key, value in older.items() if value is not None})
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(Faults) as caught:
        read_recipe(file)
    line = '`optimizer = {name = "adamw", betas = [0.9, 0.99]}`'
    assert f"train.betas: has moved to [optimizer]: write {line} above the first [table]" in str(caught.value)
    read, _ = read_usable_recipe(file, [], plugins())
    assert (read.optimizer.name, read.optimizer.config.betas) == ("adamw", [0.9, 0.99])
    assert (read.schedule.name, read.schedule.config.warmup_steps) == ("wsd", 3)
    state = TrainingState(step=1, tokens=1, runs_dense=False, source={})
    before = Before.of(tmp_path, state, text)
    assert changes(before.tables, read) == [], "a resumed run compares them with the new ones"
