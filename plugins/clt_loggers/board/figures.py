"""Figures of a run's last values, as images for TensorBoard: scores by layer, densities, thresholds.

Drawn once, when a run ends: drawing takes longer than a step.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor

from clt_loggers.board.pages import GROUPS, TITLES, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "Figures (NMSE and L0 by layer, densities, thresholds) need matplotlib: `pip install 'clt-plugins[plots]'`."
NAMES = {"train": "training", "eval": "held out", "evaluate": "evaluation"}
DPI = 100


def figures(by_layer: Mapping[str, Tensor], by_feature: Mapping[str, Tensor]) -> Iterator[Any]:
    """Summaries of the figures for which there are values.

    Args:
        by_layer: metrics [L] by `group/name`.
        by_feature: metrics [L, F].

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib  # noqa: F401 - missing, it is told before anything is drawn

    for one in ("nmse", "l0"):
        lines = {group: by_layer[name] for group in GROUPS if (name := f"{group}/{one}_by_layer") in by_layer}
        if lines:
            yield _drawn(f"figures/{one}_by_layer", lambda axes, one=one, lines=lines: _lines(axes, one, lines))  # type: ignore[misc]
    density = best(by_feature, "density")
    if density is not None:
        yield _drawn("figures/density", lambda axes: _spread(axes, density.double().log10(), "log10 of density"))
    threshold = best(by_feature, "threshold")
    if threshold is not None:
        yield _drawn("figures/thresholds", lambda axes: _spread(axes, threshold.double(), "threshold"))


def _whole_numbers(axes: Axes) -> None:
    """Layers are numbered in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _lines(axes: Axes, name: str, lines: Mapping[str, Tensor]) -> None:
    for group, values in lines.items():
        axes.plot(range(len(values)), values.tolist(), marker="o", label=NAMES[group])
    axes.set_xlabel("layer")
    axes.set_ylabel(TITLES[name])
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.legend()


def _spread(axes: Axes, values: Tensor, name: str) -> None:
    """The distribution over the features of each layer: its middle half, 5 % to 95 %, and the median."""
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    rows = [row[row.isfinite()] for row in values]
    layers = [layer for layer, row in enumerate(rows) if len(row)]
    if not layers:
        return
    low, lower, middle, upper, high = torch.stack([rows[layer].quantile(shares) for layer in layers]).T.tolist()
    axes.fill_between(layers, low, high, alpha=0.2, label="5 % to 95 % of features", step="mid")
    axes.fill_between(layers, lower, upper, alpha=0.4, label="25 % to 75 %", step="mid")
    axes.plot(layers, middle, marker="o", label="median")
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    _whole_numbers(axes)
    axes.legend()


def _drawn(tag: str, draw: Callable[[Axes], None]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    image = Summary.Image(width=7 * DPI, height=4 * DPI, colorspace=4, encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
