"""Metrics that forget something: how features may look, that a run is resumed, that there are several ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, assert_only, needs_ranks

METRIC = """
class Metric:
    def __init__(self, context):
        self.parallel, self.mean = context.parallel, None
        if REFUSES:
            raise Refused("metrics", "mine does not know other ranks: set parallel.tensor = 1")

    def step(self, step):
        values = step.features.values
        number = NUMBER
        self.mean = float(number) if self.mean is None else 0.5 * self.mean + 0.5 * float(number)
        return {"train/mine": REPORTED}

    def held_out(self):
        return None

    STATE

@hookimpl
def clt_metrics():
    return [Spec("mine", Config, lambda config, context: Metric(context))]
"""
TOTAL = 'self.parallel.total(values.double().sum(), over="all")'
STATE = """def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]"""
RIGHT = {"REFUSES": "False", "NUMBER": TOTAL, "REPORTED": "float(number)", "STATE": "pass"}
SMOOTHED = {"REPORTED": "self.mean"}


@pytest.mark.parametrize(
    ("changed", "name", "text"),
    [
        ({}, "", ""),
        ({"NUMBER": "values.mean()"}, "forms", "'train/mine' of sparse features as of dense ones"),
        (
            {"NUMBER": f"{TOTAL}; number = number / (1 if step.features.pairs is None else LENGTH)"}
            | {"LENGTH": "(1 + len(values) - step.features.active().sum())"},
            "forms",
            "'train/mine' of sparse features with empty pairs as of dense ones",
        ),
        (SMOOTHED | {"STATE": STATE}, "", ""),
        (SMOOTHED, "resume", "'train/mine' of step 4, resumed after step 3, as if never stopped"),
    ],
    ids=["right", "a mean over values", "a length with empty pairs", "state", "no state"],
)
def test_a_metric_that_is_wrong_in_one_way(check: Any, changed: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + METRIC, ("numbers", "forms", "resume"), **RIGHT | changed)
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}


def test_a_metric_that_refuses_some_ranks_is_tried_on_others(check: Any) -> None:
    needs_ranks()

    def on_ranks(**changed: str) -> str:
        said: str = check(HEADER + METRIC, ("ranks",), **RIGHT | changed)["ranks"]
        return said

    refuses = "context.parallel.tensor_ranks > 1"
    assert on_ranks(REFUSES=refuses) == "pass"
    wrong = on_ranks(REFUSES=refuses, NUMBER="self.parallel.total(values.double().sum())")
    assert "'train/mine' on rank 0 of 2 data ranks as in one process" in wrong
    reason = "metrics[0]: mine does not know other ranks: set parallel.tensor = 1"
    assert on_ranks(REFUSES="context.parallel.world > 1") == f"skip: it refuses several ranks: {reason}"
