"""Metrics for TensorBoard. It groups tags by the part before their first `/`, and shows each group as a section.

| logged | shown |
| --- | --- |
| a number `eval/nmse` | the curve `eval/nmse` |
| a tensor [L] `eval/nmse_by_layer` | L curves `eval_nmse_by_layer/00`, ... in a section; pages of "Custom scalars" |
| a tensor [L, F] `eval/density` | L histograms over features, `eval_density_log10_by_layer/00`, ... |
| the recipe | the text `recipe`; settings in "HParams", beside the last held-out scores |
| at the end | the text `scores`, a table; figures by layer |

Histograms of densities are of log10, since densities spread over many powers of ten. They leave out features of density
0, which have no logarithm; `eval/dead_fraction` counts those. Every histogram leaves out values that are not finite.

Settings and held-out scores for "HParams" are in a folder of their own, `hparams/`: TensorBoard offers every curve of a
run's folder as a score. No record names the settings that are compared: TensorBoard then takes those of all runs
together, and shows those that differ first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import summary

from clt_loggers.board.events import EventFile
from clt_loggers.board.figures import MISSING, figures
from clt_loggers.board.pages import HELD_OUT, layer_tag, layout, quantity, settings, table
from clt_loggers.values import dimensions
from clt_plugins import toml_text

BINS = 64
"""Bins of each histogram, of equal width."""


class TensorBoard:
    """A `Logger`: one event file for each process that worked on the run, and one for the comparison of runs."""

    def __init__(self, folder: Path, flush_seconds: float):
        self.folder = folder
        self.flush_seconds = flush_seconds
        self._file: EventFile | None = None
        self._compared: EventFile | None = None
        self._flushed = 0.0
        self._step = 0
        self._end: Any = None
        self._numbers: dict[str, float] = {}
        self._by_layer: dict[str, Tensor] = {}
        self._by_feature: dict[str, Tensor] = {}
        self._pages: Any = None
        self._paged = 0
        """How many metrics by layer there were when the pages were written."""

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Begin event files. Readers then hide what an interrupted run logged after `step`.

        Raises:
            OSError: a file cannot be written, or the run's folder is missing.
        """
        self._step = step
        self._file = EventFile(self.folder, step)
        self._file.add(step, summary=summary.text("recipe", f"```toml\n{toml_text(recipe)}```"))
        self._compared = EventFile(self.folder / "hparams", step)
        _, begin, self._end = summary.hparams(dict(settings(recipe)), {})
        self._compared.add(step, summary=begin)
        self._flush()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert self._file is not None and self._compared is not None, "log before start"
        self._step = step
        for name, value in metrics.items():
            if dimensions(value) == 0:
                self._numbers[name] = float(value)
                self._file.add(step, summary=summary.scalar(name, float(value)))
                if name.startswith(HELD_OUT):
                    self._compared.add(step, summary=summary.scalar(f"held_out/{quantity(name)}", float(value)))
            elif dimensions(value) == 1:
                self._by_layer[name] = value
                for layer, item in enumerate(value.tolist()):
                    self._file.add(step, summary=summary.scalar(layer_tag(name, layer), item))
            else:
                self._by_feature[name] = value
                self._add_histograms(step, name, value)
        if len(self._by_layer) > self._paged:
            self._add_pages(step)
        if time.monotonic() - self._flushed >= self.flush_seconds:
            self._flush()

    def close(self, status: str) -> None:
        """Write what is in memory, and what is shown of the end. A run that did not finish may be resumed: its session
        is not ended."""
        if self._file is None or self._compared is None or self._file.closed:
            return
        if status != "failed":  # what failed may have no disk left, and ends as soon as it can
            self._add_summary()
        if status == "finished":
            self._compared.add(self._step, summary=self._end)
        self._file.close()
        self._compared.close()

    def _add_pages(self, step: int) -> None:
        """Lay out the pages anew, if the new metrics by layer are about new quantities."""
        assert self._file is not None
        self._paged = len(self._by_layer)
        pages = layout(list(self._by_layer), max(len(values) for values in self._by_layer.values()))
        if pages != self._pages:
            self._pages = pages
            self._file.add(step, summary=pages)

    def _add_summary(self) -> None:
        assert self._file is not None
        text = table(self._numbers, self._by_layer)
        if text:
            self._file.add(self._step, summary=summary.text("scores", text))
        try:
            for figure in figures(self._by_layer, self._by_feature):
                self._file.add(self._step, summary=figure)
        except ImportError:
            self._file.add(self._step, summary=summary.text("figures", MISSING))

    def _add_histograms(self, step: int, name: str, values: Tensor) -> None:
        assert self._file is not None
        values = values.double()
        if name.endswith("density"):
            name, values = f"{name}_log10", values.log10()
        for layer, row in enumerate(values):
            finite = row[row.isfinite()]
            if len(finite):
                self._file.add(step, summary=summary.histogram(layer_tag(name, layer), finite, bins=BINS))

    def _flush(self) -> None:
        assert self._file is not None and self._compared is not None
        self._file.flush()
        self._compared.flush()
        self._flushed = time.monotonic()
