"""Metrics for TensorBoard. It folds tags on their first `/`, so that the groups of metrics are the folds.

| logged | shown |
| --- | --- |
| a number `eval/nmse` | the curve `eval/nmse` |
| a tensor [L] `eval/nmse_by_layer` | L curves `eval_nmse_by_layer/00`, ... in a fold of their own |
| a tensor [L, F] `eval/density` | L histograms over features, `eval_density_log10_by_layer/00`, ... |

Densities are histograms of log10: they spread over many powers of ten. Features of density 0 have no logarithm and are
not in them; `eval/dead_fraction` counts those. Nor are values that are not finite in any histogram.

The events are TensorBoard's and PyTorch's own; only the file is written here rather than by `SummaryWriter`, whose
thread meets a full disk some steps later, with a stack trace.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import summary

from clt_loggers.growing import Growing
from clt_plugins import toml_text

BINS = 64
"""Of equal width, in each histogram."""


class TensorBoard:
    """One event file per process that worked on the run.

    Besides metrics it holds the recipe, as the text `recipe`, and for the comparison of runs ("HParams") the recipe's
    values and the last held-out metrics, written at the end.
    """

    def __init__(self, folder: Path, flush_seconds: float):
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._file: Growing | None = None
        self._waiting = io.BytesIO()
        self._flushed = 0.0
        self._recipe: Mapping[str, Any] = {}
        self._step = 0
        self._evaluated: dict[str, float] = {}

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Begin an event file; readers hide what an interrupted run logged beyond `step`.

        Raises:
            OSError: it cannot be written, or the run's folder is missing.
        """
        self._recipe, self._step = recipe, step
        self.folder.mkdir(exist_ok=True)
        # Readers take the files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self._file = Growing(self.folder / f"events.out.tfevents.{seconds:010}.{nanoseconds:09}", "xb")
        self._add(step, file_version="brain.Event:2")
        if step > 0:
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(step, summary=summary.text("recipe", f"```toml\n{toml_text(recipe)}```"))
        self._flush()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if getattr(value, "ndim", 0) == 0}
        evaluated = {name: value for name, value in numbers.items() if name.startswith("eval/")}
        self._evaluated = evaluated or self._evaluated
        self._step = step
        for name, value in metrics.items():
            dimensions = getattr(value, "ndim", 0)
            if dimensions == 0:
                self._add(step, summary=summary.scalar(name, numbers[name]))
            elif dimensions == 1:
                for layer, item in enumerate(value.tolist()):
                    self._add(step, summary=summary.scalar(_layer_tag(name, layer), item))
            else:
                self._add_histograms(step, name, value)
        if time.monotonic() - self._flushed >= self.flush_seconds:
            self._flush()

    def close(self, status: str) -> None:
        """Write what waits. A run that did not finish may go on later: its session is left open."""
        if self._file is None or self._file.closed:
            return
        # Readers keep the first that they find, so there is none before there are metrics for it to name.
        if self._evaluated:
            experiment, start, end = summary.hparams(dict(_flatten(self._recipe)), self._evaluated)
            for part in [experiment, start, *([end] if status == "finished" else [])]:
                self._add(self._step, summary=part)
        self._flush()
        self._file.close()

    def _add_histograms(self, step: int, name: str, values: torch.Tensor) -> None:
        values = values.double()
        if name.endswith("density"):
            name, values = f"{name}_log10", values.log10()
        for layer, row in enumerate(values):
            finite = row[row.isfinite()]
            if len(finite):
                self._add(step, summary=summary.histogram(_layer_tag(name, layer), finite, bins=BINS))

    def _add(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        RecordWriter(self._waiting).write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._file is not None, "log before start"
        records, self._waiting = self._waiting.getvalue(), io.BytesIO()
        self._file.write(records)
        self._flushed = time.monotonic()


def _layer_tag(name: str, layer: int) -> str:
    """Padded with zeros, since TensorBoard sorts tags as text."""
    fold = name.removesuffix("_by_layer").replace("/", "_")
    return f"{fold}_by_layer/{layer:02}"


def _flatten(table: Any, path: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """A recipe's values by path, `losses[0].weight`; a list of plain values is one value, its text."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    elif isinstance(table, list) and table and all(isinstance(item, Mapping) for item in table):
        for index, item in enumerate(table):
            yield from _flatten(item, f"{path}[{index}]")
    else:
        yield path, table if isinstance(table, int | float | str) else str(table)
