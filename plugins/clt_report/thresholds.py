"""The distribution of thresholds, layer by layer: as a table, a plot, and histograms for TensorBoard.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder

QUANTILES = {"lowest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "highest": 1.0}


def report(transcoder: CrossLayerTranscoder, folder: Path | None, *, as_json: bool) -> str:
    """The distribution as text; into a folder, if given, `thresholds.png` and TensorBoard's events.

    Raises:
        ValueError: the transcoder has no thresholds.
    """
    activation: Any = transcoder.activation
    if not hasattr(activation, "threshold"):
        name = transcoder.choices["activation"].name
        raise Refused("thresholds", f"{name} has none, it selects features by rank: convert it first")
    found = activation.threshold().detach().cpu().double()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        events(found, folder)
        plotted = plot(found, folder / "thresholds.png")
    rows = distribution(found)
    if as_json:
        return json.dumps({"layers": rows}, indent=2)
    lines = [f"{'layer':>6}" + "".join(f"{name:>10}" for name in (*QUANTILES, "mean"))]
    for layer, row in enumerate(rows):
        lines.append(f"{layer:>6}" + "".join(f"{row[name]:>10.4g}" for name in (*QUANTILES, "mean")))
    if folder is not None and plotted:
        lines.append(f"plot in {folder / 'thresholds.png'}")
    elif folder is not None:
        lines.append("no plot: it needs matplotlib: python -m pip install 'clt-plugins[plots]'")
    return "\n".join(lines)


def distribution(thresholds: Tensor) -> list[dict[str, float]]:
    """Quantiles and mean of each layer's thresholds [L, F]."""
    at = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return [
        {**dict(zip(QUANTILES, row.quantile(at).tolist(), strict=True)), "mean": float(row.mean())}
        for row in thresholds
    ]


def plot(thresholds: Tensor, file: Path) -> bool:
    """A histogram per layer, one above the other on one axis, as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False

    layers = len(thresholds)
    figure = Figure(figsize=(7, 1 + 0.9 * layers), layout="constrained")
    axes = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    edges = torch.linspace(0, float(thresholds.max()) or 1.0, 81).tolist()
    for layer, (row, axis) in enumerate(zip(thresholds, axes, strict=True)):
        axis.hist(row.tolist(), bins=edges, color="tab:blue")
        axis.axvline(float(row.median()), color="black", linewidth=1)
        axis.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
        axis.set_yticks([])
    axes[-1].set_xlabel("threshold, in units of pre-activations (line: median)")
    figure.savefig(file, dpi=120)
    return True


def events(thresholds: Tensor, folder: Path) -> None:
    """A histogram per layer, of log10 where it has one."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for layer, row in enumerate(thresholds):
            writer.add_histogram(f"thresholds_by_layer/{layer:02}", row, 0)
            if bool((row > 0).any()):
                writer.add_histogram(f"thresholds_log10_by_layer/{layer:02}", row[row > 0].log10(), 0)
