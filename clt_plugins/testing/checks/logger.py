"""Checks for `[[loggers]]`: see `clt_plugins.contract.results.logger.Logger`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from clt_plugins.recipe.read import recipe_data
from clt_plugins.testing.bench import FEATURES, LAYERS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, location

PROMPT_S = 0.05
"""The longest that a call of `log` may take, at the median: a step of a small run takes about as long."""
HANGS_S = 30.0
"""A call that takes longer counts as one that never ends."""


def metrics(step: int) -> dict[str, Any]:
    """What a run logs: numbers, one value per layer, a histogram; NaN too."""
    numbers = torch.Generator().manual_seed(step)
    return {
        "tokens": 16 * step,
        "loss/total": 1 / (1 + step),
        "loss/strange": float("nan"),
        "optim/lr": 1e-3,
        "time/tokens_per_s": 4096.0,
        "train/nmse_by_layer": torch.rand(LAYERS, generator=numbers),
        "eval/density": torch.rand(LAYERS, FEATURES, generator=numbers),
    }


def started(bench: Bench, folder: Path, step: int = 0) -> Any:
    """The logger after `start` in a folder."""
    folder.mkdir(exist_ok=True)
    recipe = bench.recipe()
    context = attrs.evolve(bench.parts().context, folder=folder, recipe=recipe)
    logger = bench.build(context)
    logger.start(recipe_data(recipe), step)
    return logger


@check("loggers")
def protocol(bench: Bench) -> None:
    """start, log (numbers, [L], [L, F], NaN), close, for each way a run ends; `close` alone where it never began."""
    for status in ("finished", "interrupted", "failed"):
        logger = started(bench, bench.folder / status)
        for step in range(1, 4):
            before = metrics(step)
            logger.log(step, before)
            expect(before.keys() == metrics(step).keys(), "the metrics as they were", "changed in place", "`log`")
        logger.log(3, {"eval/nmse": 0.5})
        logger.close(status)
    folder = bench.folder / "never"
    folder.mkdir()
    bench.build(attrs.evolve(bench.parts().context, folder=folder)).close("failed")


@check("loggers")
def resume(bench: Bench) -> None:
    """A run that was killed at step 6 resumes from step 4 in the same folder: steps 5 and 6 are logged again."""
    folder = bench.folder / "run"
    first = started(bench, folder)
    for step in range(1, 7):
        first.log(step, metrics(step))
    # No close: the process was killed. The object stays alive here, so that its deletion flushes nothing.
    second = started(bench, folder, step=4)
    for step in range(5, 9):
        second.log(step, metrics(step))
    second.close("finished")
    first.close("failed")


@check("loggers")
def flush(bench: Bench) -> None:
    """Everything logged is written when `close` returns: a process that dies right after it has written as much as one
    that ends normally."""
    job = {
        "module": bench.module,
        "choice": bench.choice,
        "settings": dict(bench.settings),
        "tables": dict(bench.tables),
        "folder": str(bench.folder),
    }
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "clt_plugins.testing.processes.dying_logger", json.dumps(job)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        complain("a process that logs and dies after `close`", last, "`start`, `log` and `close`")
    size = {
        way: sum(f.stat().st_size for f in (bench.folder / way).rglob("*") if f.is_file()) for way in ("dies", "ends")
    }
    # A time in a file may have a character more or less.
    expect(
        size["dies"] >= 0.98 * size["ends"],
        f"{size['ends']} bytes on disk or out, as where the interpreter ends by itself",
        f"{size['dies']}",
        "`close`: flush and close files, join threads, before it returns",
    )


@check("loggers")
def prompt(bench: Bench) -> None:
    """`log` does not delay the training step: the median of 40 calls is at most 0.05 s."""
    logger = _within(lambda: started(bench, bench.folder / "run"), "start")
    seconds = []

    def log_all() -> None:
        for step in range(1, 41):
            numbers, began = metrics(step), time.perf_counter()
            logger.log(step, numbers)
            seconds.append(time.perf_counter() - began)

    _within(log_all, "log")
    _within(lambda: logger.close("finished"), "close")
    median = sorted(seconds)[len(seconds) // 2]
    expect(
        median <= PROMPT_S,
        f"log to return within {PROMPT_S} s (median of {len(seconds)})",
        f"{median:.3f} s",
        "`log`: waits for a network or a disk? Hand metrics to a thread through a queue, join it in `close`",
    )


def _within(function: Callable[[], Any], name: str) -> Any:
    """What a function returns. It runs in a thread: one that hangs can only be abandoned."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANGS_S)
    if thread.is_alive():
        frame = sys._current_frames().get(thread.ident or 0)
        look = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else name
        complain(f"{name} to return", f"it hangs for more than {HANGS_S:g} s", look)
    if errors:
        complain(f"{name} to run through", f"{type(errors[0]).__name__}: {errors[0]}", location(errors[0]))
    return results[0]
