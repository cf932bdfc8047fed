"""The number of every step, against formulas written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clt_plugins import Faults, Schedule, build, read_recipe
from clt_plugins.model.assemble import make_context
from tests.support.helpers import parts, recipe, tables

STEPS = 40


def schedule(name: str, **settings: Any) -> Schedule:
    typed = recipe(schedule={"name": name, **settings})
    return build(typed.schedule, make_context(typed))


def rate(name: str, step: int, warmup: int, steps: int, highest: float) -> float:
    """The learning rate of a step, as the guide defines it."""
    if step < warmup:
        return highest * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    if name == "linear":
        return highest + (0.1 * highest - highest) * share
    if name == "cosine":
        return highest * (1 + math.cos(math.pi * share)) / 2
    if name == "linear_final20" and step > 0.8 * steps:
        return highest * (steps - step) / (steps - max(warmup, 0.8 * steps))
    return highest


@pytest.mark.parametrize("warmup", [0, 1, 7, 36, STEPS - 1])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "linear_final20"])
def test_the_rate_of_every_step(name: str, warmup: int) -> None:
    one = schedule(name, warmup_steps=warmup) if warmup < 12 else _unchecked(name, warmup)
    for step in range(STEPS):
        assert one(step, STEPS, 3e-3) == pytest.approx(rate(name, step, warmup, STEPS, 3e-3), rel=1e-12), step


def _unchecked(name: str, warmup: int) -> Schedule:
    typed = recipe(schedule={"name": name, "warmup_steps": warmup}, train={"steps": STEPS})
    return build(typed.schedule, make_context(typed))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_a_warm_up_that_is_not_given_is_a_tenth_of_the_steps(name: str) -> None:
    asked, given = schedule(name), _unchecked(name, 4)
    assert [asked(step, STEPS, 1.0) for step in range(STEPS)] == [given(step, STEPS, 1.0) for step in range(STEPS)]
    assert asked(0, 5, 1.0) == 1.0, "no warm-up in five steps"


def test_bits_are_those_of_the_formulas_as_runs_have_had_them() -> None:
    """Written like the code that older runs were trained by; sums in another order would differ in the last bit."""
    older = {
        "linear": lambda share, done: 3e-4 * (1 - (1 - 0.1) * share),
        "cosine": lambda share, done: 3e-4 * 0.5 * (1 + math.cos(math.pi * share)),
        "wsd": lambda share, done: 3e-4 * min(1.0, (1 - done) / 0.2),
    }
    for name, formula in older.items():
        one = schedule(name, warmup_steps=7)
        for step in range(7, 1003):
            share, done = (step - 7) / max(1, 1003 - 7), min(1.0, step / 1003)
            assert one(step, 1003, 3e-4) == formula(share, done), (name, step)


@pytest.mark.parametrize(("name", "last"), [("linear", 0.25), ("cosine", 0.25), ("wsd", 0.25)])
def test_it_ends_where_it_should_and_stays_there(name: str, last: float) -> None:
    one = schedule(name, end=0.25, warmup_steps=0)
    assert one(STEPS, STEPS, 2.0) == one(10 * STEPS, STEPS, 2.0) == pytest.approx(2.0 * last)


def test_wsd_is_at_its_peak_until_it_falls() -> None:
    one = schedule("wsd", decay=0.5, warmup_steps=4)
    assert [one(step, 8, 1.0) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_ramp_rises_from_zero_after_its_delay() -> None:
    assert [schedule("ramp")(step, 4, 2.0) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert [schedule("ramp", delay=0.5)(step, 4, 2.0) for step in range(5)] == [0.0, 0.0, 0.0, 1.0, 2.0]


def test_a_warm_up_of_all_steps_is_refused_wherever_it_stands() -> None:
    schedule_of_weight = {"name": "cosine", "warmup_steps": 12}
    losses = ["mse", {"name": "auxk", "weight_schedule": schedule_of_weight}]
    with pytest.raises(Faults, match=r"losses\[1\]\.weight_schedule\.warmup_steps: must be < steps \(12\): 12$"):
        read_recipe(tables(losses=losses))
    with pytest.raises(Faults, match=r"schedule\.warmup_steps: must be < steps \(7\): 12"):
        read_recipe(tables(schedule=schedule_of_weight, train={"schedule_steps": 7}))


def test_what_is_above_k_falls_by_a_schedule() -> None:
    falls = {"name": "cosine", "warmup_steps": 0}
    chosen = {"name": "topk", "k": 4, "anneal_from": 2.5, "anneal_schedule": falls}
    activation: Any = parts(activation=chosen).transcoder.activation
    for step in range(13):
        activation.schedule(min(1.0, step / 12))
        assert activation.training_k == [round(4 * (1 + 1.5 * (1 + math.cos(math.pi * step / 12)) / 2))]
        assert activation.k == [4], "what evaluation uses"
