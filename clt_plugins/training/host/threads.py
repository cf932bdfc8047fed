"""Fewer threads while other programs keep the cores busy.

Threads of one operation wait for each other. Where more programs run than there are cores, the system takes a core away
from one of them for some milliseconds, and all others wait: operations of a tenth of a millisecond then take as many
times as long. One thread loses only its share of the cores.

What a step computes does not depend on the number of threads, so it may change at any step: the kernels' products have
a fixed order of sums, torch's split over other axes than those they sum over. (Sums over everything, such as a logged
loss, may differ in their last bits.)
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIAL = 4
"""Steps that a number of threads is judged by, after a first one that is not counted."""
AWAY = 0.15
"""Share of its time for which the loop's own thread has no core, from which on a machine counts as busy. Alone on a
machine it is some hundredths."""
BETTER = 0.9
"""Another number of threads is better if its steps take at most this share of the time."""
HOLD, LONGEST_HOLD = 32, 1024
"""Steps before a change that was no good is tried again: at first, and at most. Each failure doubles it."""
FEWER, MORE = -1, 1


class Threads:
    """Torch's number of threads in a run, between 1 and what it is at the beginning. The kernels follow it.

    It is halved while the machine is busy and fewer threads are faster, and doubled again after a while where more are.

    Args:
        fixed: leave it as it is. OMP_DYNAMIC=false, OpenMP's own variable, does that too.
    """

    def __init__(self, *, fixed: bool = False):
        self.most = torch.get_num_threads()
        self.fixed = fixed or self.most == 1 or os.environ.get("OMP_DYNAMIC", "").lower() in ("false", "0")
        self.hold, self.left = {FEWER: HOLD, MORE: HOLD}, {FEWER: 0, MORE: 0}
        """Steps to wait after the next failure of a change, and those that are left to wait."""
        self.steps: list[tuple[float, float]] = []
        """Seconds, and share without a core, of the last steps with this number of threads."""
        self.tried: tuple[int, int, float] | None = None
        """While another number is tried: the direction, the number before, and its seconds."""
        self.started = 0.0, 0.0

    def begin(self) -> None:
        """A step begins: what is computed from here on is timed."""
        self.started = time.perf_counter(), time.thread_time()

    def end(self) -> None:
        """A step ends; the next one may get another number of threads."""
        if not self.fixed:
            wall, busy = time.perf_counter() - self.started[0], time.thread_time() - self.started[1]
            self.after(wall, 1 - busy / wall)

    def after(self, seconds: float, away: float) -> None:
        """Decide by a step that took so many seconds, a share of them without a core."""
        self.steps = [*self.steps, (seconds, away)][-TRIAL - 1 :]
        self.left = {way: max(0, steps - 1) for way, steps in self.left.items()}
        if self.tried is not None:
            self._judge(*self.tried)
        elif len(self.steps) > TRIAL:
            seconds, away = (statistics.median(numbers) for numbers in zip(*self.steps[1:], strict=True))
            count = torch.get_num_threads()
            if away > AWAY and count > 1 and not self.left[FEWER]:
                self._try(FEWER, count // 2, seconds)
            elif count < self.most and not self.left[MORE]:
                self._try(MORE, min(2 * count, self.most), seconds)

    def _try(self, way: int, count: int, seconds: float) -> None:
        self.tried = way, torch.get_num_threads(), seconds
        self._use(count)

    def _judge(self, way: int, old: int, old_seconds: float) -> None:
        """Stay with the number that is tried, or go back to the old one, if that can be said by now."""
        seconds = [one for one, _ in self.steps]
        # A step that is much slower is not repeated more than once.
        worse = len(seconds) > 1 and min(seconds) > old_seconds
        if len(seconds) <= TRIAL and not worse:
            return
        self.tried = None
        if worse or statistics.median(seconds[1:]) > BETTER * old_seconds:
            self._use(old)
            self.left[way], self.hold[way] = self.hold[way], min(2 * self.hold[way], LONGEST_HOLD)
        else:
            self.left[-way], self.hold[way] = self.hold[-way], HOLD

    def _use(self, count: int) -> None:
        torch.set_num_threads(count)
        self.steps = []


@contextmanager
def restored_threads() -> Iterator[None]:
    """Torch's number of threads is what it was, afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
