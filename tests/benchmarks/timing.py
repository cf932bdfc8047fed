"""Timing that survives noisy machines: medians of alternating runs, and rooflines measured in the same call."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def median_seconds(function: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """The median time of a call."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def alternate(systems: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each system, in turn: A B A B ..., so that a slow spell of the machine hits all alike."""
    out: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, step in systems.items():
            out[name].append(step())
    return out


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes per second at which all threads together read memory."""
    x = torch.ones(megabytes * 2**18)
    return x.numel() * 4 / median_seconds(lambda: x.sum())


def peak_rss_gb() -> float:
    """The largest resident size of this process so far, in GB (10^9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def threads() -> int:
    """How many threads a measurement uses: what OMP_NUM_THREADS says, else one for each core."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def machine() -> dict[str, Any]:
    """What was measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


BUSY = "x = 1\nwhile True: x = x * 3 % 1000003"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many busy processes beside what is timed, as on a shared machine."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
