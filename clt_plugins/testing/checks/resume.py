"""Resuming: a run that goes on from a checkpoint ends as one that never stopped."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from clt_plugins.files.folders import read_tensors
from clt_plugins.files.records import read_json
from clt_plugins.files.steps import step_folders
from clt_plugins.testing.bench import TOKENS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training.run import run
from clt_plugins.training.saved.checkpoint import TrainingState

STEPS, HALF = 6, 3
OWN = ("time/", "parallel/", "transforms/")
"""Groups of numbers that the engine logs itself."""
LOOK = (
    "what changes during a run and is neither a parameter nor a buffer of a torch.nn.Module, nor given by `state`: no "
    "checkpoint holds it"
)


@check("encoder", "activation", "tying", "losses", "normalisation", "metrics", "callbacks")
def resume(bench: Bench) -> None:
    """6 steps end as 3, a checkpoint, all plugins built anew, and 3 more: weights, the optimizer's numbers, what
    plugins keep and what metrics report are the same bit for bit."""
    changes = small_run(bench)
    if bench.slot == "losses" and bench.choice != "mse":
        # A loss may be 0, without a gradient, in a step (AuxK without dead features).
        changes["losses"] = [*bench.recipe_data()["losses"], {"name": "mse"}]
    with torch.random.fork_rng():
        whole, whole_data = _end(bench, changes)
        logged = _logged(bench)
        again, again_data = _end(bench, changes, resume=f"step_{HALF:06}")
    _compare(logged, _logged(bench))
    for name, value in whole.items():
        expect(name in again, f"{name}, resumed after step {HALF}", "there is none", LOOK)
        same(again[name], value, f"{name} after step {STEPS}, resumed after step {HALF}, as if never stopped", LOOK)
    expect(whole.keys() == again.keys(), f"the tensors {sorted(whole)}", str(sorted(again)), LOOK)
    what = f"the same `state` after step {STEPS}, resumed after step {HALF}: {whole_data}"
    expect(again_data == whole_data, what, str(again_data), "`state` and `load_state`")


def _compare(logged: dict[str, str], resumed: dict[str, str]) -> None:
    """
    Raises:
        Nonconformance: a metric reported something else in a run that was resumed.
    """
    for name, value in logged.items():
        what = f"{name}, resumed after step {HALF}, as if never stopped: {value}"
        expect(resumed.get(name) == value, what, resumed.get(name, "none"), LOOK)
    more = sorted(resumed.keys() - logged.keys())
    expect(not more, f"the numbers of a run that never stopped: {', '.join(logged)}", f"also {', '.join(more)}", LOOK)


def _end(bench: Bench, changes: dict[str, Any], resume: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors at the end of a run, and the plain data of its plugins."""
    out = bench.folder / "run"
    trained = run(bench.recipe(**changes), out=out, resume=resume, plugins=bench.plugins)
    last = step_folders(out / "checkpoints")[-1]  # a callback may end the run earlier
    # Of the checkpoint, and what a callback made of it at the end.
    tensors = {f"{name} of training": x for name, x in read_tensors(last / "training.safetensors").items()}
    tensors |= {f"{name} at the end": x.clone() for name, x in trained.tensors().items()}
    tensors = {**read_tensors(last / "transcoder.safetensors"), **tensors}
    return tensors, read_json(last / "training.json", TrainingState).plugins


def _logged(bench: Bench) -> dict[str, str]:
    """What a metric reported, each number as it was written; nothing of other kinds of plugins."""
    if bench.slot != "metrics":
        return {}
    lines = (bench.folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {
        f"{name!r} of step {line['step']}": json.dumps(value)
        for line in map(json.loads, lines)
        for name, value in line.items()
        if not name.startswith(OWN)
    }


def small_run(bench: Bench, **changes: Any) -> dict[str, Any]:
    """Changes of the bench's recipe for a run of a few steps, in which callbacks act.

    All features are dead from the second step on until they are active, so that what waits for dead features is tried
    too. Settings of callbacks called `every` and `tokens` that the plugin's test does not give are small.
    """
    train: dict[str, Any] = {"steps": STEPS, "checkpoint_every": HALF, "keep_checkpoints": 9, "log_every": STEPS}
    train |= {"eval_every": 2, "eval_tokens": 2 * TOKENS, "lr": 0.01, "dead_after_tokens": TOKENS}
    train["statistics_tokens"] = 2 * TOKENS
    if bench.slot == "metrics":
        train["log_every"], changes["loggers"] = 1, [{"name": "jsonl"}]
    if bench.slot == "callbacks":
        small = {name: value for name, value in {"every": 2, "tokens": 4 * TOKENS}.items() if name in bench.settable()}
        changes["callbacks"] = [{"name": bench.choice, **small, **bench.settings}]
    return {"train": train, **changes}
