"""Loggers that write lines: JSON for programs, columns for people."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from clt_plugins import Context

if TYPE_CHECKING:
    from clt_loggers import ConsoleConfig


class JSONLLogger:
    """`metrics.jsonl`: a line per log call, each flushed, so that a crash loses none.

    Tensors [L] become lists; histograms [L, F] are left out. A resumed run first drops the lines beyond its step.
    """

    def __init__(self, context: Context):
        assert context.folder is not None
        self.path = context.folder / "metrics.jsonl"
        self.file: Any = None

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        if self.path.exists():
            _drop_beyond(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = {"step": step}
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                line[name] = _finite(value)
            elif value.dim() <= 1:
                line[name] = [_finite(x) for x in value.tolist()] if value.dim() else _finite(value.item())
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def close(self, status: str) -> None:
        if self.file is not None and not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _drop_beyond(path: Path, step: int) -> None:
    """Keep the lines up to a step; a torn last line (a crash while writing) goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


class ConsoleLogger:
    """`step 200  loss/total 0.213  ...`, written around the progress bar."""

    def __init__(self, config: ConsoleConfig):
        self.metrics = config.metrics

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        shown = [f"{name} {_short(metrics[name])}" for name in self.metrics if name in metrics]
        if shown:
            tqdm.write("  ".join([f"step {step:>6}", *shown]), file=sys.stderr)

    def close(self, status: str) -> None:
        sys.stderr.flush()


def _short(value: Any) -> str:
    number = float(value)
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
