"""A lot of runs: each is a process and a file with its figures, and one that is there is not run again.

A result is that of its setup, recipe and seed. It counts as long as every setting that it was run with is what the
recipe gives today; a new setting, whose default leaves things as they were, does not make it void.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from clt_plugins import Lock, load_plugins, read_recipe, recipe_data
from tests.benchmarks.quality import data
from tests.benchmarks.quality.one import BUSY, Job, portable
from tests.benchmarks.quality.setups import Setup


@attrs.frozen
class Lot:
    """Where results are, and how they are made."""

    folder: Path
    threads: int = 1
    jobs: int = 1
    peer_python: str = ""

    def job(self, setup: Setup, recipe: str, seed: int, tables: dict[str, Any], *, peer: bool = False) -> Job:
        """A training of ours, or of decode-clt."""
        known = {**tables, "seed": seed} if peer else portable(tables)
        digest = hashlib.sha256(json.dumps([_size(setup), known], sort_keys=True).encode()).hexdigest()[:12]
        key = f"{setup.name}/{re.sub(r'[^a-z0-9.]+', '-', recipe)}-{seed}-{digest}"
        python = self.peer_python if peer else ""
        return Job(
            setup=setup,
            folder=self.folder.resolve(),
            key=key,
            recipe=recipe,
            seed=seed,
            tables=tables,
            peer_python=python,
            threads=self.threads,
        )

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those without a result that counts, each once."""
        once: dict[str, Job] = {}
        for job in jobs:
            if result(job) is None:
                once.setdefault(job.digest, job)
        return list(once.values())

    def run(self, jobs: Iterable[Job]) -> list[Job]:
        """Run what is missing, some at a time; returns those that failed.

        Those of another process are left to it, and count as failed if it has not finished them by the end. What
        another has done in the meantime is not done again.
        """
        clean(self.folder)
        left = self.missing(jobs)
        tell(f"{len(left)} runs to do")
        running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
        failed: list[Job] = []
        done = 0
        with Terminated():
            try:
                queue = iter(left)
                while True:
                    while len(running) < self.jobs and (job := next(queue, None)) is not None:
                        if result(job) is None:
                            running[self._start(job)] = job, time.perf_counter()
                            continue
                        done += 1
                        tell(f"{done}/{len(left)}  {name(job)}: another process has done it")
                    if not running:
                        return [job for job in failed if result(job) is None]
                    time.sleep(0.05)
                    for process in [process for process in running if process.poll() is not None]:
                        job, began = running.pop(process)
                        done += 1
                        failed += [job] if process.returncode else []
                        tell(f"{done}/{len(left)}  {time.perf_counter() - began:5.0f} s  {summary(job, process)}")
            finally:
                for process in running:
                    _end(process)
                clean(self.folder)

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        runs = self.folder / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        # Compiled loops use no more threads than torch, which this sets.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        process = data.python("-m", "tests.benchmarks.quality.one", stdin=subprocess.PIPE, env=environment)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its exit status says so
            process.stdin.write(json.dumps(attrs.asdict(job), default=str).encode())
            process.stdin.close()
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run: the first signal asks, the second stops at once, and neither is waited for long."""
    for stop in (process.terminate, process.terminate, process.kill):
        stop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return
    process.wait()


def result(job: Job) -> dict[str, Any] | None:
    """A job's figures, if they are there and count."""
    if not job.result.is_file():
        return None
    figures: dict[str, Any] = json.loads(job.result.read_text())
    if job.peer_python or "source" not in job.tables:
        return figures
    return None if differences(figures["settings"], today(job)) else figures


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings of a run that its recipe would give another value now."""
    new = dict(_flat(now))
    return [path for path, value in _flat(then) if path in new and new[path] != value]


def today(job: Job) -> dict[str, Any]:
    """A job's whole recipe, every default included."""
    from clt_plugins.training.optimizers.rate import with_rate

    tables = {**job.tables}
    if tables["source"]["name"] == "local":
        tables["source"] = {**tables["source"], "path": "unused"}
    recipe = read_recipe(tables, plugins=_plugins())
    settings = recipe_data(recipe)
    rate = with_rate(recipe.train, job.setup.n_layers * recipe.transcoder.features)
    return portable({**settings, "train": {**settings["train"], "lr": rate.lr}})


def clean(folder: Path) -> None:
    """Remove what killed runs have left: everything of which nobody holds the lock."""
    for left in (folder / "runs").glob("*.lock"):
        if Lock(left).holder() is None:
            for work in left.parent.glob(f"{left.stem}.*"):
                shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)


def name(job: Job) -> str:
    return f"{job.setup.name}: {job.recipe}, seed {job.seed}"


def summary(job: Job, process: subprocess.Popen[bytes]) -> str:
    """A line about a run that has ended."""
    if process.returncode == BUSY:
        return f"{name(job)}: left to another process"
    figures = result(job)
    if process.returncode or figures is None:
        return f"{name(job)}: failed with {process.returncode}"
    shown = ("nmse_report", "nmse_choose", "l0_report", "dead_fraction_report", "ce_recovered", "kl", "cpu_step_s")
    return name(job) + "".join(f"  {key} {figures[key]:.4g}" for key in shown if figures.get(key) is not None)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _size(setup: Setup) -> dict[str, Any]:
    """What a result depends on besides its recipe."""
    names = ("tokens", "choose_tokens", "report_tokens", "model_tokens", "source", "batch")
    return {name: getattr(setup, name) for name in names} | {"layers": setup.model.get("layers")}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        yield f"{path}.length", len(value)
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{index}]")
    else:
        yield path, value


_loaded: list[Any] = []


def _plugins() -> Any:
    if not _loaded:
        _loaded.append(load_plugins())
    return _loaded[0]


class Terminated:
    """Within it, SIGTERM ends the program as Ctrl-C does: what it has started is ended too."""

    def __enter__(self) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        self.before = signal.signal(signal.SIGTERM, stop)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)
