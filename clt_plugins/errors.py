"""How a command ends: one enumeration of exit codes."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The same on every rank; the text comes from rank 0."""

    OK = 0
    FAILED = 1
    """The run failed, or a plugin is broken."""
    USAGE = 2
    """The command line or the recipe is wrong; nothing was started."""
    GUARD = 3
    """A guard stopped the run: the loss was not finite."""
    INTERRUPTED = 130
    """Stopped by the user, after a checkpoint."""


class Stopped(Exception):
    """A run that ended early on purpose: by the user, or by a guard."""

    def __init__(self, code: ExitCode, message: str):
        super().__init__(message)
        self.code = code
