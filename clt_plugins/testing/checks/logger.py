"""Checks for `[[loggers]]`: see `clt_plugins.contract.results.logger.Logger`."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

import attrs
import torch

from clt_plugins.recipe.read import recipe_data
from clt_plugins.testing.bench import FEATURES, LAYERS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, location

PROMPT_S = 0.05
"""The longest that a call of `log` may take: a step of a small run takes about as long."""
BUFFERED_S = 4.0
"""How long what was logged may wait for a thread that writes it."""
HANGS_S = 30.0
"""A call that takes longer counts as one that never ends."""


def metrics(step: int, *, histograms: bool = True) -> dict[str, Any]:
    """What a run logs: numbers, one value per layer, a histogram; NaN too. `marks` says which numbers tell the step."""
    numbers = torch.Generator().manual_seed(step)
    logged = {
        "tokens": 16 * step,
        "loss/total": marks(step)[0],
        "loss/strange": float("nan"),
        "optim/lr": 1e-3,
        "time/tokens_per_s": 4096.0,
        "train/nmse_by_layer": torch.rand(LAYERS, generator=numbers),
        "eval/nmse": marks(step)[1],
    }
    return logged | ({"eval/density": torch.rand(LAYERS, FEATURES, generator=numbers)} if histograms else {})


def marks(step: int) -> tuple[float, float]:
    """Numbers that no other step logs, which differ in their first three digits: a training and a held-out one."""
    return 0.3711 + 0.0137 * step, 0.7253 + 0.0119 * step


def started(bench: Bench, folder: Path, step: int = 0) -> Any:
    """The logger after `start` in a folder."""
    folder.mkdir(exist_ok=True)
    recipe = bench.recipe()
    context = attrs.evolve(bench.parts().context, folder=folder, recipe=recipe)
    logger = bench.build(context)
    logger.start(recipe_data(recipe), step)
    return logger


@check("loggers", basic=True)
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
    """A run that was killed at step 6 resumes from step 4 in the same folder. Its files then hold each step once, as if
    it had never stopped: nothing from before is lost, steps 5 and 6 are not there twice.

    What a logger buffers must be written with what is logged a minute later, or by a thread within some seconds. A new
    file for each start is allowed. Skipped where the files of the run's folder do not hold the numbers as text or as
    IEEE numbers.
    """
    whole = started(bench, bench.folder / "whole")
    for step in range(1, 9):
        whole.log(step, metrics(step))
    whole.close("finished")
    expected = _found(bench.folder / "whole")
    if not expected:
        raise SkipTest("its files do not hold the numbers that it was given")
    folder = bench.folder / "run"
    first = started(bench, folder)
    for step in range(1, 5):
        first.log(step, metrics(step))
    with _later():
        for step in range(5, 7):
            first.log(step, metrics(step))
    _wait(folder, expected)
    # No close: the process was killed. The object stays alive here, so that its deletion flushes nothing.
    second = started(bench, folder, step=4)
    for step in range(5, 9):
        second.log(step, metrics(step))
    second.close("finished")
    found = _found(folder)
    with suppress(Exception):  # it is dead; only its threads and files are released here
        first.close("failed")
    for step in sorted({step for _, step in expected}):
        kinds = [kind for kind, other in expected if other == step]
        kept = any((kind, step) in found for kind in kinds)
        look = "`start`: append to what is there" if step < 5 else "`log` after a `start` with `step` > 0"
        if step < 5:
            look += "; `log`: write out what is buffered with the next `log` some seconds later, or by a thread within "
            look += f"{BUFFERED_S:g} s: a killed process writes no more"
        expect(kept, f"step {step} in the files after a resume from step 4", "it is lost", look)
        twice = [kind for kind in kinds if found.get((kind, step), 0) > expected[kind, step]]
        look = "`start`: drop what was logged beyond its `step`; it will come again"
        expect(not twice, f"step {step} once in a file after a resume from step 4", "it is there again", look)


def _wait(folder: Path, expected: dict[tuple[str, int], int]) -> None:
    """Wait where a thread may still write what the process was given before it is killed."""
    deadline, last = time.monotonic() + BUFFERED_S, 4
    while any(mark[1] <= last and mark not in _found(folder) for mark in expected) and time.monotonic() < deadline:
        last = 6  # and the steps that are lost: no thread writes once the process is dead
        time.sleep(0.1)


@contextmanager
def _later() -> Iterator[None]:
    """A minute later, as far as a logger asks `time`."""
    clocks = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}
    clocks |= {f"{name}_ns": getattr(time, f"{name}_ns") for name in clocks}
    with ExitStack() as stack:
        for name, clock in clocks.items():
            ahead = 60 * 10**9 if name.endswith("_ns") else 60.0
            stack.enter_context(patch.object(time, name, lambda clock=clock, ahead=ahead: clock() + ahead))
        yield


def _found(folder: Path) -> dict[tuple[str, int], int]:
    """How often the files of a folder hold the marks of each step, by kind of mark: the most often in any one file."""
    found: dict[tuple[str, int], int] = {}
    for file in (file for file in folder.rglob("*") if file.is_file()):
        data = file.read_bytes()
        digits = [text for text in re.findall(rb"(?<![\d.])\d+\.\d+(?:e[-+]?\d+)?", data) if len(text) < 40]
        numbers = [float(text) for text in digits]
        for step in range(1, 9):
            for kind, mark in zip(("train", "eval"), marks(step), strict=True):
                as_text = sum(abs(number - mark) < 6e-4 for number in numbers)
                packed = sum(data.count(struct.pack(form, mark)) for form in ("<f", ">f", "<d", ">d"))
                count = as_text or packed
                if count:
                    found[kind, step] = max(found.get((kind, step), 0), count)
    return found


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
    """`log` does not delay the training step: none of 120 calls over 1200 steps takes more than 0.05 s, but the first.

    A slow call counts if the same one is slow three times: a busy machine delays others.
    """
    slow = _seconds(bench, "run")
    for number in (2, 3):
        if max(slow.values()) <= PROMPT_S:
            return
        again = _seconds(bench, f"run{number}")
        slow = {step: min(seconds, again[step]) for step, seconds in slow.items()}
    step, seconds = max(slow.items(), key=lambda item: item[1])
    expect(
        seconds <= PROMPT_S,
        f"log to return within {PROMPT_S} s, at every step",
        f"{seconds:.3f} s at step {step}",
        "`log`: draws, or waits for a network or a disk? Hand metrics to a thread through a queue, join it in `close`",
    )


def _seconds(bench: Bench, name: str) -> dict[int, float]:
    """How long each call of `log` takes, by step, without the first: it may set up."""
    logger = _within(lambda: started(bench, bench.folder / name), "start")
    seconds: dict[int, float] = {}

    def log_all() -> None:
        for step in range(10, 1201, 10):
            numbers, began = metrics(step, histograms=step % 100 == 0), time.perf_counter()
            logger.log(step, numbers)
            seconds[step] = time.perf_counter() - began

    _within(log_all, "log")
    _within(lambda: logger.close("finished"), "close")
    return {step: value for step, value in seconds.items() if step > 10}


def _within(function: Callable[[], Any], name: str, file: str = "") -> Any:
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
        complain(f"{name} to run through", f"{type(errors[0]).__name__}: {errors[0]}", location(errors[0], file))
    return results[0]
