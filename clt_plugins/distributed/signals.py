"""Ctrl-C and SIGTERM, in every phase of a command.

While a loop can stop after its step, a signal asks for that, and a second one stops at once. In all other phases the
first one stops at once, as `KeyboardInterrupt`: it is no `Exception`, so that nothing takes it for a failure, and
`distributed/agree` does not wait for ranks that are gone. It leaves the command as `Stopped`.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from clt_plugins.errors import ExitCode, Stopped

logger = logging.getLogger(__name__)


class Signals:
    """What signals do at the moment, and whether one has come."""

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal has asked the loop to stop."""
        self.phase = "interrupted before training: nothing is changed"
        """Where the command is, and what is on disk: what the user reads after it was stopped at once."""
        self._loop = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._loop or self.asked:
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


@contextmanager
def heard() -> Iterator[Signals]:
    """Ctrl-C and SIGTERM do what `Signals` says, until the end of the block; in the main thread only.

    Raises:
        Stopped: interrupted at once.
    """
    signals = Signals()
    try:
        before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}  # signals belong to the main thread; elsewhere the caller has them
    try:
        yield signals
    except KeyboardInterrupt:
        raise Stopped(ExitCode.INTERRUPTED, signals.phase if _speaks() else "") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
