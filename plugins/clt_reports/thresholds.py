"""The distribution of thresholds in each layer: as a table, a plot, and histograms for TensorBoard.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import Refused, Thresholded

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder

QUANTILES = {"lowest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "highest": 1.0}


def report(transcoder: CrossLayerTranscoder, folder: Path | None, *, as_json: bool) -> str:
    """The distribution as text; with a folder, also `thresholds.png` and TensorBoard's events in it.

    Raises:
        Refused: the transcoder has no thresholds, or the plot cannot be drawn here.
    """
    activation = transcoder.activation
    if not isinstance(activation, Thresholded):
        name = transcoder.choices["activation"].name
        raise Refused("activation", f"{name} has no thresholds: convert the transcoder to thresholds first")
    thresholds = activation.threshold().detach().cpu().double()
    if folder is not None:
        plot(thresholds, folder / "thresholds.png")
        write_events(thresholds, folder)
    rows = distribution(thresholds)
    if as_json:
        return json.dumps({"layers": rows}, indent=2)
    lines = [f"{'layer':>6}" + "".join(f"{name:>10}" for name in (*QUANTILES, "mean"))]
    for layer, row in enumerate(rows):
        lines.append(f"{layer:>6}" + "".join(f"{row[name]:>10.4g}" for name in (*QUANTILES, "mean")))
    if folder is not None:
        lines.append(f"plot in {folder / 'thresholds.png'}")
    return "\n".join(lines)


def distribution(thresholds: Tensor) -> list[dict[str, float]]:
    """Quantiles and mean of each layer's thresholds [L, F]."""
    shares = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return [
        {**dict(zip(QUANTILES, row.quantile(shares).tolist(), strict=True)), "mean": float(row.mean())}
        for row in thresholds
    ]


def plot(thresholds: Tensor, file: Path) -> None:
    """A histogram for each layer, one above the other with one axis, as a PNG. Creates the file's folder.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused(
            file.name, "drawing it needs matplotlib: pip install 'clt-plugins[plots]', or give --no-plot"
        ) from error

    file.parent.mkdir(parents=True, exist_ok=True)
    n_layers = len(thresholds)
    figure = Figure(figsize=(7, 1 + 0.9 * n_layers), layout="constrained")
    axes = figure.subplots(n_layers, 1, sharex=True, squeeze=False)[:, 0]
    edges = torch.linspace(0, float(thresholds.max()) or 1.0, 81).tolist()
    for layer, (row, axis) in enumerate(zip(thresholds, axes, strict=True)):
        axis.hist(row.tolist(), bins=edges, color="tab:blue")
        axis.axvline(float(row.median()), color="black", linewidth=1)
        axis.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
        axis.set_yticks([])
    axes[-1].set_xlabel("threshold, in units of pre-activations (line: median)")
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:  # of a write, which does not name the file
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_events(thresholds: Tensor, folder: Path) -> None:
    """A histogram for each layer, and one of log10 of its thresholds above 0."""
    # The logger `tensorboard` writes event files itself, to name the file when a disk is full in the middle of a run.
    # For one file that is written once, PyTorch's writer is enough.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for layer, row in enumerate(thresholds):
            writer.add_histogram(f"thresholds_by_layer/{layer:02}", row, 0)
            if bool((row > 0).any()):
                writer.add_histogram(f"thresholds_log10_by_layer/{layer:02}", row[row > 0].log10(), 0)
