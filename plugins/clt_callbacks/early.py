"""An end of training by held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clt_plugins import Context, Refused, Training

if TYPE_CHECKING:
    from clt_callbacks import EarlyStoppingConfig


class EarlyStopping:
    """A `Callback`, and `Stateful`: a resumed run has the patience that is left."""

    every = 0

    def __init__(self, config: EarlyStoppingConfig, context: Context):
        self.config = config
        self.best: float | None = None
        self.waited = 0
        """Evaluations since the best one."""

    def evaluated(self, run: Training, metrics: Mapping[str, Any]) -> None:
        """Compare the newest value with the best one."""
        known = {name: value for name, value in run.metrics.items() if isinstance(value, int | float)}
        name = self.config.metric
        if name not in known:
            text = f"no number {name!r} has been logged by step {run.step}; there are: {', '.join(sorted(known))}"
            raise Refused("callbacks.metric", text)
        value = float(known[name])
        sign = 1 if self.config.better == "lower" else -1
        # NaN is never better.
        if self.best is None or sign * (self.best - value) > self.config.change:
            self.best, self.waited = (value, 0) if value == value else (None, self.waited + 1)
        else:
            self.waited += 1
        if self.waited >= self.config.patience and run.step < run.steps:
            best = "no number" if self.best is None else f"{self.best:.6g}"
            run.stop(f"{name} has not been better than {best} for {self.waited} evaluations")

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
