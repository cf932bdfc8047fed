"""Metrics as lines of text on stderr: `step    500   tokens      32,000   loss      0.4321   tokens/s       4,096`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from clt_loggers.values import dimensions, plain

LABELS = {
    "loss/total": "loss",
    "optim/lr": "lr",
    "time/tokens_per_s": "tokens/s",
    "eval/nmse": "held-out NMSE",
    "eval/l0": "L0",
    "eval/dead_fraction": "dead",
}
"""Short names of columns. The others are called by the metric's name."""
OTHERS = 6
"""Numbers in a line that has no chosen column but `tokens`: what a callback or a stage logs by itself."""


class Console:
    """A `Logger`: one line per call that has any of the columns, without the columns that it does not have.

    Args:
        label: stands before each line, where several runs write them.
    """

    def __init__(self, metrics: Sequence[str], label: str = ""):
        self.metrics = metrics
        self.label = f"{label}   " if label else ""

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        names = [name for name in self.metrics if name in metrics and dimensions(metrics[name]) < 2]
        if names == ["tokens"] != self.metrics:
            names += [name for name, value in metrics.items() if name != "tokens" and dimensions(value) == 0][:OTHERS]
        if names:
            columns = [f"{LABELS.get(name, name)} {_text(name, metrics[name]):>11}" for name in names]
            # tqdm removes a progress bar, prints, and draws the bar again below.
            tqdm.write(self.label + "   ".join([f"step {step:>6}", *columns]), file=sys.stderr)

    def close(self, status: str) -> None:
        """Nothing to do: every line was printed when it was logged."""


def _text(name: str, value: Any) -> str:
    """A value in few characters: fractions in per cent, counts and rates with separators, values by layer in
    brackets."""
    value = plain(value)
    if isinstance(value, list):
        return "[" + " ".join(f"{item:.3g}" for item in value) + "]"
    if name.endswith("_fraction"):
        return f"{value:.1%}"
    if name.endswith("_per_s"):
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
