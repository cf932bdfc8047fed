"""Times of work on a GPU, by its own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Marks in the queue of a device. Reading them waits; setting them does not."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Remember when the device comes to this point."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [first.elapsed_time(second) for first, second in zip(self.marks, self.marks[1:], strict=False)]
        return [1e3 * (second - first) for first, second in zip(self.marks, self.marks[1:], strict=False)]


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 2) -> float:
    """The median time of a call on the device."""
    for _ in range(warmup):
        function()
    clock = Clock(device)
    clock.mark()
    for _ in range(repeats):
        function()
        clock.mark()
    return statistics.median(clock.between())
