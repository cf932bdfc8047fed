"""`--set`: settings that a flag changes before they are checked, and faults that name the flag."""

from __future__ import annotations

from typing import Any

import pytest

from clt_plugins.recipe.overrides import parse
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.plugins import Plugins
from tests.support.recipes import GOOD, faults


def test_set_changes_settings_before_they_are_checked(stubbed: Plugins) -> None:
    changes = ["activation.k=7", "train.lr=3e-4", "losses.0.weight=5", "losses.1.name=layered", "losses.1.layers=[1]"]
    recipe = read_recipe(GOOD, [*changes, "name=run-2024", "model.path=org/name"], stubbed)
    assert recipe.activation.config.k == 7
    assert recipe.train.lr == 3e-4
    assert recipe.losses[0].config.weight == 5
    assert recipe.losses[1].config.layers == [1]
    assert recipe.name == "run-2024"
    assert recipe.model is not None
    assert recipe.model.path == "org/name"
    whole = read_recipe(GOOD, ['activation={name="some",k=9}'], stubbed)
    assert whole.activation.config.k == 9
    assert GOOD["activation"] == "some"


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("activation.k=abc", '--set activation.k=abc: expected int, got "abc"'),
        ("activation.warmpu=1", "--set activation.warmpu=1: unknown key, did you mean 'warmup'?"),
        ("activation.k=-3", "--set activation.k=-3: must be > 0: -3"),
        ("losses.0.weight=x", '--set losses.0.weight=x: expected float, got "x"'),
        ("losses.3.weight=1", "--set losses.3.weight=1: losses has 2 items, counted from 0"),
        (
            "losses.first.weight=1",
            "--set losses.first.weight=1: unknown name 'first' "
            "(known: auxk, ce, depth, hierarchical, kl, l0, layered, matryoshka, mse, preactivation, tanh_sparsity)",
        ),
        ("name.x=1", "--set name.x=1: name is not a table"),
        ("activation.k", "--set activation.k: expected KEY=VALUE, such as train.steps=100"),
        ("=3", "--set =3: expected KEY=VALUE, such as train.steps=100"),
        ('activation={name="some",k="a"}', '--set activation={name="some",k="a"}: activation.k: expected int, got "a"'),
        (
            "optimizer.betas.1=0.99",
            "--set optimizer.betas.1=0.99: expected list of float, got {1 = 0.99} "
            "(write the whole list: optimizer.betas=[...])",
        ),
        (
            "activation.foo.0=1",
            "--set activation.foo.0=1: unknown key (known: dtype, k, warmup)",
        ),
        ("train.lr.x=5", "--set train.lr.x=5: expected float, got {x = 5}"),
        ("model.dtype=float16", "--set model.dtype=float16: model.path: required, but missing"),
        ("activation.k=65", "--set activation.k=65: must be <= transcoder.features (64)"),
    ],
)
def test_a_fault_that_comes_from_a_flag_names_the_flag(stubbed: Plugins, setting: str, line: str) -> None:
    assert faults(GOOD, stubbed, setting) == [line]


def test_an_unknown_name_from_a_flag_names_the_flag(stubbed: Plugins) -> None:
    (line,) = faults(GOOD, stubbed, "losses.0.name=msee")
    assert line.startswith("--set losses.0.name=msee: unknown name 'msee', did you mean 'mse'?")


def test_the_last_of_two_flags_holds_and_is_blamed(stubbed: Plugins) -> None:
    assert read_recipe(GOOD, ["activation.k=a", "activation.k=3"], stubbed).activation.config.k == 3
    assert faults(GOOD, stubbed, "activation.k=3", "activation.k=a") == ['--set activation.k=a: expected int, got "a"']


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("runs/x", "runs/x"),
        ("2024-01-01", "2024-01-01"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_a_flags_value_is_toml_or_a_bare_string(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)
