"""Checks for `[[callbacks]]`: see `clt_plugins.contract.training.callback.Callback`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import SkipTest

from clt_plugins.errors import Faults, Stopped
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.checks.resume import small_run
from clt_plugins.testing.checks.tensor_parallel import CHOICE, refusal
from clt_plugins.testing.processes.pool import on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training.between.calls import misfit
from clt_plugins.training.run import run

GRIDS: dict[str, dict[str, Any]] = {"features": {"tensor": 2}, "tokens": {"data": 2}}
"""What two ranks share between them."""
ROUNDING = 1e-6
"""Of float64, after a few steps of Adam, whose first steps depend on the sign of small gradients alone."""


@check("callbacks", trial=True, basic=True)
def members(bench: Bench) -> None:
    """It has a method of a callback, and its `every` fits them."""
    callback = bench.parts().callbacks[0]
    text = misfit(callback)
    expect(not text, "an object of the protocol `Callback`", text, f"the class {type(callback).__name__}")


@check("callbacks")
def ranks(bench: Bench) -> None:
    """A run on 2 ranks that share features, and one on 2 that share tokens, end with the weights of one process.

    It may refuse one of the two. Skipped where it refuses both, or no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    changes = small_run(bench, transcoder={"dtype": "float64", "path": "sparse"})
    run(bench.recipe(**changes), out=bench.folder / "one", plugins=bench.plugins)
    one = SlicedTensors.find(bench.folder / "one" / "transcoder", "transcoder")
    look = (
        "what depends on one rank's features or tokens alone: add it up by `run.parallel.total` (over features, or "
        'over="tokens"); number features over all ranks; draw by `generator(run.context.seed, ...)`, the same on all'
    )
    refusals: list[str] = []
    for shared, sizes in GRIDS.items():
        out = bench.folder / shared
        results = on_ranks(bench, 2, run_on_rank, {**changes, "parallel": {"name": CHOICE, **sizes}}, str(out))
        if reason := refusal(results):
            refusals.append(reason)
            continue
        two = SlicedTensors.find(out / "transcoder", "transcoder")
        for name in one.shapes:
            what = f"{name} of 2 ranks that divide the {shared} among them as in one process"
            same(two.read(name), one.read(name), what, look, ROUNDING)
    if len(refusals) == len(GRIDS):
        raise SkipTest(f"it refuses several ranks: {refusals[0]}")


def run_on_rank(bench: Bench, changes: dict[str, Any], out: str) -> str | None:
    """A whole run, of which this process is a rank; why it is refused."""
    try:
        run(bench.recipe(**changes), out=Path(out), plugins=bench.plugins)
    except Faults as error:
        return str(error)
    except Stopped as error:
        # Of ranks that refuse together rank 0 says why, and the others stop without a text.
        if str(error) or not isinstance(error.__cause__, Faults | None):
            raise
        return "as rank 0 says"
    return None
