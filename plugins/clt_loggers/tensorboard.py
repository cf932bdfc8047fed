"""Metrics for TensorBoard. It groups tags by the part before their first `/`, and shows each group as a section.

| logged | shown |
| --- | --- |
| a number `eval/nmse` | the curve `eval/nmse` |
| a tensor [L] `eval/nmse_by_layer` | L curves `eval_nmse_by_layer/00`, ... in another section |
| a tensor [L, F] `eval/density` | L histograms over features, `eval_density_log10_by_layer/00`, ... |

Histograms of densities are of log10, since densities spread over many powers of ten. They leave out features of density
0, which have no logarithm; `eval/dead_fraction` counts those. Every histogram leaves out values that are not finite.

TensorBoard and PyTorch make the events; only the file is written here. PyTorch's `SummaryWriter` writes in a thread:
when the disk is full, the error comes some steps later, with a stack trace, and does not name the file.
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
from clt_loggers.values import dimensions
from clt_plugins import toml_text

BINS = 64
"""Bins of each histogram, of equal width."""


class TensorBoard:
    """A `Logger`: one event file for each process that worked on the run.

    Besides metrics it holds the recipe, as the text `recipe`. At the end it gets the recipe's values and the last
    held-out metrics, for TensorBoard's comparison of runs ("HParams").
    """

    def __init__(self, folder: Path, flush_seconds: float):
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._file: Growing | None = None
        self._records = io.BytesIO()
        self._flushed = 0.0
        self._recipe: Mapping[str, Any] = {}
        self._step = 0
        self._evaluated: dict[str, float] = {}

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Begin an event file. Readers then hide what an interrupted run logged after `step`.

        Raises:
            OSError: the file cannot be written, or the run's folder is missing.
        """
        self._recipe, self._step = recipe, step
        self.folder.mkdir(exist_ok=True)
        # Readers read the files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self._file = Growing(self.folder / f"events.out.tfevents.{seconds:010}.{nanoseconds:09}", "xb")
        self._add(step, file_version="brain.Event:2")
        if step > 0:
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(step, summary=summary.text("recipe", f"```toml\n{toml_text(recipe)}```"))
        self._flush()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if dimensions(value) == 0}
        evaluated = {name: value for name, value in numbers.items() if name.startswith("eval/")}
        self._evaluated = evaluated or self._evaluated
        self._step = step
        for name, value in metrics.items():
            if name in numbers:
                self._add(step, summary=summary.scalar(name, numbers[name]))
            elif dimensions(value) == 1:
                for layer, item in enumerate(value.tolist()):
                    self._add(step, summary=summary.scalar(_layer_tag(name, layer), item))
            else:
                self._add_histograms(step, name, value)
        if time.monotonic() - self._flushed >= self.flush_seconds:
            self._flush()

    def close(self, status: str) -> None:
        """Write what is in memory. A run that did not finish may be resumed: its session is not ended."""
        if self._file is None or self._file.closed:
            return
        # Readers use the first of these records, so it is written only when there are metrics for it to name.
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
        RecordWriter(self._records).write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._file is not None, "log before start"
        records, self._records = self._records.getvalue(), io.BytesIO()
        self._file.write(records)
        self._flushed = time.monotonic()


def _layer_tag(name: str, layer: int) -> str:
    """The tag of one layer; with leading zeros, since TensorBoard sorts tags as text."""
    section = name.removesuffix("_by_layer").replace("/", "_")
    return f"{section}_by_layer/{layer:02}"


def _flatten(table: Any, path: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """A recipe's values by path, such as `losses[0].weight`. A list of numbers or texts is one value, as text."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    elif isinstance(table, list) and table and all(isinstance(item, Mapping) for item in table):
        for index, item in enumerate(table):
            yield from _flatten(item, f"{path}[{index}]")
    else:
        yield path, table if isinstance(table, int | float | str) else str(table)
