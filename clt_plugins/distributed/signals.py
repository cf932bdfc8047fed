"""Ctrl-C and SIGTERM, in every phase of a command.

While a loop can stop after its step, a signal asks for that, and a second one stops at once. In all other phases the
first one stops at once, as `KeyboardInterrupt`: it is no `Exception`, so that nothing takes it for a failure, and
`distributed/agree` does not wait for ranks that are gone. It leaves the command as `Stopped`.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clt_plugins.errors import ExitCode, Stopped

logger = logging.getLogger(__name__)

SAME_S = 2.0
"""A SIGTERM so soon after another signal is the same request: SLURM may send one to all processes of a step, and
torchrun another one to its ranks."""
AGAIN_S = 0.05
"""After which an interrupt comes again that could not be raised."""


class Signals:
    """What signals do at the moment, and whether one has come."""

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal has asked the loop to stop."""
        self.phase = "interrupted before training: nothing is changed"
        """Where the command is, and what is on disk: what the user reads after it was stopped at once."""
        self.raised = False
        """Whether a signal has stopped the command at once."""
        self._loop = False
        self._asked_s = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._loop and self.asked and number == signal.SIGTERM and now - self._asked_s < SAME_S:
            return
        self._asked_s = now
        if not self._loop or self.asked:
            self.raised = True
            raise KeyboardInterrupt
        self.asked = True
        if _speaks():
            logger.warning("stopping after this step (again to stop at once)")

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """Inside, a first signal only asks."""
        self._loop = True
        try:
            yield
        finally:
            self._loop = False


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Again:
    """Python's hook for exceptions that cannot be raised. A signal may come while C code calls back, as LLVM does when
    Numba loads a kernel: the interrupt would be printed and forgotten. Here it comes again a moment later."""

    def __init__(self, otherwise: Callable[[Any], Any]):
        self.otherwise = otherwise
        """The hook for all other exceptions."""
        self.waiting: list[threading.Timer] = []
        self.over = False

    def __call__(self, unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            self.otherwise(unraisable)
            return
        timer = threading.Timer(AGAIN_S, self._interrupt)
        timer.daemon = True
        self.waiting.append(timer)
        timer.start()

    def _interrupt(self) -> None:
        if not self.over:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def end(self) -> None:
        """No interrupt comes from here on."""
        self.over = True
        for timer in self.waiting:
            timer.cancel()
            timer.join()


@contextmanager
def heard() -> Iterator[Signals]:
    """Ctrl-C and SIGTERM do what `Signals` says, until the end of the block; in the main thread only.

    Raises:
        Stopped: interrupted at once.
    """
    signals = Signals()
    unraisable, again = sys.unraisablehook, _Again(sys.unraisablehook)
    try:
        before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}  # signals belong to the main thread; elsewhere the caller has them
    try:
        if before:
            sys.unraisablehook = again
        yield signals
    except KeyboardInterrupt:
        raise Stopped(ExitCode.INTERRUPTED, signals.phase if _speaks() else "") from None
    except Exception as error:
        # C code may make an error of its own of an interrupt.
        if signals.raised and not isinstance(error, Stopped):
            raise Stopped(ExitCode.INTERRUPTED, signals.phase if _speaks() else "") from error
        raise
    finally:
        if before:
            again.end()
            sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
