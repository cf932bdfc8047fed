"""Metrics as lines of text on stderr: `step    500   tokens      32,000   loss      0.4321   tokens/s       4,096`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

LABELS = {
    "loss/total": "loss",
    "optim/lr": "lr",
    "time/tokens_per_s": "tokens/s",
    "eval/nmse": "held-out NMSE",
    "eval/l0": "L0",
    "eval/dead_fraction": "dead",
}
"""Short names of columns; others keep their own."""


class Console:
    """One line per call that has any of the columns; those it does not have are left out."""

    def __init__(self, metrics: Sequence[str]):
        self.metrics = metrics

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        found = [name for name in self.metrics if name in metrics and getattr(metrics[name], "ndim", 0) < 2]
        if found:
            columns = [f"{LABELS.get(name, name)} {_text(name, metrics[name]):>11}" for name in found]
            # tqdm's own way to print lifts a progress bar out of the way and puts it back below.
            tqdm.write("   ".join([f"step {step:>6}", *columns]), file=sys.stderr)

    def close(self, status: str) -> None:
        """Nothing to do: every line went out when it was logged."""


def _text(name: str, value: Any) -> str:
    """A value in few characters: shares in per cent, counts and rates with separators, values by layer in brackets."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return "[" + " ".join(f"{item:.3g}" for item in value) + "]"
    if name.endswith("_fraction"):
        return f"{value:.1%}"
    if name.endswith("_per_s"):
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
