"""The frontier as a picture: NMSE and recovered cross-entropy over L0. It needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from clt_plugins.files.atomic import write_file
from clt_plugins.toml import inline
from clt_plugins.training.sweep.result.frontier import LOWER, Frontier, Point

AXES = {"nmse": "NMSE (lower is better)", "ce_recovered": "cross-entropy recovered (higher is better)"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that the colour-blind tell apart (Okabe & Ito 2008), the yellow left out: it is too light on white."""


def panels(frontier: Frontier) -> list[str]:
    """The scores that some member has."""
    return [score for score in LOWER if any(_has(point, score) for point in frontier.members)]


def series(frontier: Frontier) -> dict[str, list[Point]]:
    """Members of one colour: those that differ only in numbers and seeds, by what they have in common."""
    words = [
        key
        for key in frontier.keys
        if any(not isinstance(point.settings[key], int | float) for point in frontier.members)
    ]
    out: dict[str, list[Point]] = {}
    for point in frontier.members:
        name = ", ".join(f"{key.split('.')[-1]}={_short(point.settings[key])}" for key in words)
        out.setdefault(name, []).append(point)
    return out


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return value if isinstance(value, str) else inline(value)


def _has(point: Point, score: str) -> bool:
    return point.l0 is not None and getattr(point, score) is not None


def on_frontier(frontier: Frontier, score: str) -> list[Point]:
    """The members on a frontier, by L0."""
    return sorted((point for point in frontier.members if score in point.optimal), key=lambda point: point.l0 or 0.0)


def draw(frontier: Frontier, file: Path) -> bool:
    """Draw the picture into a PNG file; False where matplotlib is not installed, or no member has scores."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = panels(frontier)
    figure = Figure(figsize=(6.4 * max(1, len(shown)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{frontier.name}: {len(frontier.members)} transcoders")
    for number, score in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        _panel(axes, frontier, score)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_file(file, content.getvalue())
    return True


def _panel(axes: Any, frontier: Frontier, score: str) -> None:
    line = on_frontier(frontier, score)
    axes.plot([p.l0 for p in line], [getattr(p, score) for p in line], color="#888888", zorder=1, label="frontier")
    several = series(frontier)
    for index, (name, points) in enumerate(several.items()):
        known = [point for point in points if _has(point, score)]
        colour = COLOURS[index % len(COLOURS)]
        for full in (True, False):
            some = [point for point in known if (score in point.optimal) == full]
            axes.scatter(
                [p.l0 for p in some],
                [getattr(p, score) for p in some],
                s=36,
                facecolors=colour if full else "none",
                edgecolors=colour,
                zorder=2,
                label=name if full == any(score in p.optimal for p in known) and name else None,
            )
    middle = sum(axes.get_xlim()) / 2
    for point in line:
        left = (point.l0 or 0.0) > middle
        axes.annotate(
            point.label,
            (point.l0, getattr(point, score)),
            xytext=(-6 if left else 6, 4),
            textcoords="offset points",
            ha="right" if left else "left",
            size=7,
        )
    axes.set_xlabel("L0: active features per token")
    axes.set_ylabel(AXES[score])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
