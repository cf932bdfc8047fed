"""What a try is, and what came of it."""

from __future__ import annotations

import shlex

import attrs

from tests.faults.forking import Ended

SEPARATOR = " / "


@attrs.frozen
class Try:
    """One fault in one command; its text is enough to repeat it."""

    family: str
    fault: str
    command: str
    detail: str
    """Which of many: the number of a call, or the seed of a mutation."""

    def __str__(self) -> str:
        return SEPARATOR.join((self.family, self.fault, self.command, self.detail))

    @classmethod
    def parse(cls, text: str) -> Try:
        return cls(*text.split(SEPARATOR, 3))

    @property
    def again(self) -> str:
        """The command that repeats it."""
        return f"python -m tests.faults --replay {shlex.quote(str(self))}"


@attrs.frozen(kw_only=True)
class Result:
    """What came of a try."""

    faults: list[str] = attrs.field(factory=list)
    """What was lost or unclear, a line each; nothing if it was survived."""
    where: str = ""
    """What the fault hit."""
    reached: bool = True
    """Whether the fault happened at all."""
    ended: Ended | None = None
