"""Timing that survives noisy machines: medians of alternating runs, and rooflines measured in the same call."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

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
