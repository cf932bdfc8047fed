"""What `[schedule]` builds, and choices for it in other settings: how a number goes over a run."""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """A number of every step: the learning rate, or a loss's weight."""

    def __call__(self, step: int, steps: int, peak: float) -> float:
        """The number in a step: finite, and from 0 to `peak`.

        It follows from the arguments alone, so that a resumed run goes on exactly.

        Args:
            step: steps done, from 0. It may go beyond `steps`: then the number stays what it was at their end.
            steps: over which it goes (`train.schedule_steps`, else `train.steps`).
            peak: the highest value.
        """
        ...
