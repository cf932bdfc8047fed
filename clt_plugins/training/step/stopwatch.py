"""Where the time of a training step goes."""

from __future__ import annotations

import time

import attrs


@attrs.define
class Stopwatch:
    """Where the seconds of a step go, averaged over the steps between two logs."""

    last: float = attrs.field(factory=time.perf_counter)
    sums: dict[str, float] = attrs.field(factory=dict)
    steps: int = 0

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a name."""
        now = time.perf_counter()
        self.sums[name] = self.sums.get(name, 0.0) + now - self.last
        self.last = now
        self.steps += name == "step_s"

    def skip(self) -> None:
        """Drop the time since the last lap."""
        self.last = time.perf_counter()

    def means(self, batch_tokens: int) -> dict[str, float]:
        """Seconds per step and tokens per second since the last call."""
        steps, total = max(1, self.steps), max(1e-9, sum(self.sums.values()))
        out = {f"time/{name}": value / steps for name, value in self.sums.items()}
        out["time/tokens_per_s"] = steps * batch_tokens / total
        self.sums, self.steps = {}, 0
        return out
