"""What a run asks of its machine: memory that stays for the next step, and fewer threads where the cores are busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import run
from clt_plugins.training.host import memory
from clt_plugins.training.host import threads as host
from clt_plugins.training.host.threads import Threads, restored_threads

Machine = Callable[[int, int], tuple[float, float]]
"""(step, threads) -> seconds of the step, and the share without a core."""


def quiet(step: int, count: int) -> tuple[float, float]:
    return 1 / count, 0.02


def busy(step: int, count: int) -> tuple[float, float]:
    """More threads wait longer for each other."""
    return float(count), 0.4


def wide(step: int, count: int) -> tuple[float, float]:
    """Busy, and more threads are faster all the same."""
    return 1 / count, 0.4


def one_core_is_busy(step: int, count: int) -> tuple[float, float]:
    """Three threads of four have a core of their own."""
    return (3.0, 0.4) if count == 4 else (1 / count, 0.02)


@pytest.fixture
def four() -> Iterator[None]:
    with restored_threads():
        torch.set_num_threads(4)
        yield


def counts(machine: Machine, steps: int, threads: Threads | None = None) -> list[int]:
    """The number of threads of each step."""
    threads = threads or Threads()
    seen = []
    for step in range(steps):
        seen.append(torch.get_num_threads())
        if not threads.fixed:
            threads.after(*machine(step, seen[-1]))
    return seen


def test_a_quiet_machine_keeps_all_threads(four: None) -> None:
    assert set(counts(quiet, 500)) == {4}


def test_a_busy_machine_gets_one_thread(four: None) -> None:
    seen = counts(busy, 2000)
    assert seen[20:40].count(1) == 20
    # More are tried again, ever more rarely, and for two steps only.
    assert sum(count > 1 for count in seen[20:]) < 25
    assert max(seen[20:]) == 2


@pytest.mark.parametrize(("own_s", "away"), [(0.5, 0.75), (2.0, 0.0)])
def test_a_step_without_a_core_is_told_from_one_that_computes(four: None, monkeypatch: Any, own_s: float, away: float):
    """Of two seconds of the clock, the loop's own thread had a core for some."""
    clock, own, told = [0.0], [0.0], []
    monkeypatch.setattr(host.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(host.time, "thread_time", lambda: own[0])
    threads = Threads()
    monkeypatch.setattr(threads, "after", lambda *numbers: told.append(numbers))
    threads.begin()
    clock[0], own[0] = 2.0, own_s
    threads.end()
    assert told == [(2.0, away)]


def test_threads_that_help_stay_although_the_machine_is_busy(four: None) -> None:
    seen = counts(wide, 2000)
    assert sum(count < 4 for count in seen) < 25


def test_as_many_threads_as_there_are_free_cores(four: None) -> None:
    seen = counts(one_core_is_busy, 500)
    assert set(seen[30:]) <= {2, 4}
    assert seen[30:].count(4) < 25


def test_threads_come_back_when_the_others_have_ended(four: None) -> None:
    def machine(step: int, count: int) -> tuple[float, float]:
        return busy(step, count) if step < 200 else quiet(step, count)

    seen = counts(machine, 1200)
    assert seen[100] == 1 and seen[-1] == 4


@pytest.mark.parametrize("value, fixed", [("false", True), ("FALSE", True), ("true", False), (None, False)])
def test_openmps_own_variable_fixes_the_number(
    four: None, value: str | None, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_DYNAMIC", value)
    assert Threads().fixed is fixed
    assert (set(counts(busy, 50)) == {4}) is fixed


def test_one_thread_stays_one() -> None:
    with restored_threads():
        torch.set_num_threads(1)
        assert Threads().fixed


def recipe(**train: Any) -> dict[str, Any]:
    """Large enough that torch divides its operations among threads."""
    return {
        "name": "threads",
        "source": {"name": "synthetic", "layers": 2, "d_model": 96, "features": 32},
        "transcoder": {"features": 256, "device": "cpu"},
        "normalisation": {"name": "mean_std"},
        "activation": {"name": "batchtopk", "k": 24},
        "losses": ["mse", {"name": "auxk", "k": 12}],
        "loggers": [],
        "train": {"steps": 3, "batch_tokens": 512, "dead_after_tokens": 512, "eval_tokens": 512, **train},
    }


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_run_whose_threads_change_has_the_same_weights(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = recipe(clip_norm=0.1)
    tables["transcoder"]["path"] = path
    with restored_threads():
        torch.set_num_threads(1)
        alone = run(tables, out=tmp_path / "one").tensors()
        cycle = iter([1, 2, 1])  # one step by two: beside busy processes that alone takes seconds
        monkeypatch.setattr(host.Threads, "end", lambda self: torch.set_num_threads(next(cycle)))
        changing = run(tables, out=tmp_path / "changing").tensors()
    assert next(cycle, None) is None
    assert all(torch.equal(alone[name], changing[name]) for name in alone)


FAULTS = """
import resource, torch
from clt_plugins.training.host.memory import kept_memory

def step():
    made = [torch.ones(800_000) for _ in range(6)]  # 781 pages each

with kept_memory(torch.device("cpu")):
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""


@pytest.mark.skipif(not memory._is_glibc(), reason="glibc only")
def test_a_step_uses_the_memory_of_the_last_one() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 100, done.stderr


@pytest.mark.parametrize(
    "device, variable, value",
    [
        ("meta", "PATH", os.environ.get("PATH", "")),
        ("cpu", "MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("cpu", "GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000"),
    ],
)
def test_memory_is_left_alone(device: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices, and where the environment says what glibc shall do."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # not called
    with memory.kept_memory(torch.device(device)):
        pass
