"""The table `[sweep]` of a recipe: which members it makes, how they are called, and what is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest

from clt_plugins import Faults
from clt_plugins.recipe.read import as_toml, read_recipe, read_sweep
from tests.support.helpers import plugins, recipe, tables
from tests.support.sweeps import many


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
        ({"activation.q": [2]}, "sweep.activation.q: unknown key"),
        ({"activation.q": [2, 3], "seed": [0, 1]}, "sweep.activation.q: unknown key"),
        ({"activation.k": [-1, -2, 3], "seed": [0, 1]}, "sweep.activation.k: -1: must be > 0: -1\n"),
        (
            {"optimizer.betas.1": [0.9]},
            "sweep.optimizer.betas.1: expected list of float, got {1 = 0.9} (write the whole",
        ),
        ({"train.lr": [0.1, -1.0]}, "sweep.train.lr: -1.0: must be > 0"),
        ({"seed": [1, 2], "zip": [["seed", "lr"]]}, 'sweep.zip: "lr" is no setting of the sweep'),
        ({"seed": [1, 2], "train.lr": [0.1], "zip": [["seed", "train.lr"]]}, "as many values each: seed has 2, "),
        ({"seed": list(range(1001))}, "makes 1,001 transcoders, more than 1,000"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_by_its_key(swept, told):
    with pytest.raises(Faults) as refused:
        read_sweep(many(swept), plugins=plugins())
    assert told in str(refused.value) and len(refused.value.faults) == told.count("\n") + 1


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
