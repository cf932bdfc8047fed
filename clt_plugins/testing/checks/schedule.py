"""Checks for `[schedule]`: see `clt_plugins.contract.training.schedule.Schedule`."""

from __future__ import annotations

import math
from typing import Any

from clt_plugins.testing.bench import Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect

RUNS = ((1, 1.0), (7, 3e-4), (100, 2.0), (1000, 1e-8))
"""Steps, and the peak."""
LOOK = "`__call__(step, steps, peak)`"


def _values(schedule: Any, steps: int, peak: float) -> dict[int, Any]:
    """The number of every step, and of some beyond the last."""
    return {step: schedule(step, steps, peak) for step in (*range(steps + 2), 3 * steps, 10**9)}


@check("schedule", trial=True)
def values(bench: Bench) -> None:
    """Every number is finite, from 0 to the peak, and not always 0, also in a run of one step; beyond the last step it
    stays that of the end."""
    parts = bench.parts()
    schedule, fitting = bench.build(parts.context), parts.context.schedule_steps
    for steps, peak in RUNS:
        found = _values(schedule, steps, peak)
        for step, value in found.items():
            what = f"step {step} of {steps} with a peak of {peak:g}"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            expect(number, f"a float in {what}", f"{type(value).__name__} {value!r}", LOOK)
            expect(math.isfinite(value) and value >= 0, f"a finite number >= 0 in {what}", f"{value}", LOOK)
            expect(
                value <= peak * (1 + 1e-9), f"at most the peak in {what}", f"{value:g}", f"{LOOK}: `peak` is highest"
            )
        expect(steps == 1 or any(found.values()), f"a number above 0 in {steps} steps", "0 in all", LOOK)
        # Settings may be for longer runs than the short ones: a warm-up that is not over at their end.
        for step in (step for step in found if step > steps >= fitting):
            what = f"in step {step} the number of the end, step {steps}: {found[steps]!r}"
            expect(found[step] == found[steps], what, repr(found[step]), f"{LOOK}: use `min(step, steps)`")


@check("schedule")
def by_step_alone(bench: Bench) -> None:
    """A number depends on the arguments alone: a resumed run, which begins in the middle, has the same."""
    parts = bench.parts()
    for steps, peak in RUNS:
        forwards = _values(bench.build(parts.context), steps, peak)
        used, fresh = (bench.build(parts.context) for _ in range(2))
        for step in reversed(forwards):
            used(0, steps, peak)
            again = used(step, steps, peak)
            alone = fresh(step, steps, peak)
            expected = f"the same number in step {step} of {steps}, whatever was asked before: {forwards[step]!r}"
            look = f"{LOOK}: what it keeps in `self` from call to call, random numbers, the time"
            expect(again == alone == forwards[step], expected, f"{again!r} and {alone!r}", look)
