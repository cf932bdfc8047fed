"""The frontier as a page: one HTML file that opens from disk. No scripts, no network; the curves are SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files

from clt_plugins.training.sweep.result.frontier import Frontier, Point, rows, seed_rows, shown
from clt_plugins.training.sweep.result.picture import AXES, on_frontier, panels, series

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 48
"""Room beside the axes for numbers and names, in pixels."""
TICKS = 5
KINDS = 7
"""Colours in the style sheet; then they begin anew."""


def page(frontier: Frontier) -> str:
    """The page."""
    template = files("clt_plugins.training.sweep.result").joinpath("frontier.html").read_text(encoding="utf-8")
    done = sum(point.status == "trained" for point in frontier.members)
    parts = {
        "title": escape(frontier.name),
        "summary": escape(f"{done} of {len(frontier.members)} transcoders trained; varied: {', '.join(frontier.keys)}"),
        "charts": "\n".join(_chart(frontier, score) for score in panels(frontier)),
        "legend": "\n".join(_legend(frontier)),
        "members": _table(rows(frontier), [point.label for point in frontier.members if point.optimal]),
        "seeds": _table(seed_rows(frontier), []),
    }
    for name, text in parts.items():
        template = template.replace(f"<!-- {name} -->", text)
    return template


def _legend(frontier: Frontier) -> Iterator[str]:
    names = [name for name in series(frontier) if name]
    for number, name in enumerate(names):
        mark = _mark(number, 7, 7, True)
        yield f'<li><svg width="14" height="14" aria-hidden="true">{mark}</svg> {escape(name)}</li>'


def _chart(frontier: Frontier, score: str) -> str:
    known = [point for point in frontier.members if point.l0 is not None and getattr(point, score) is not None]
    xs, ys = [point.l0 or 0.0 for point in known], [float(getattr(point, score)) for point in known]
    x_ticks, y_ticks = _ticks(xs), _ticks(ys)

    def x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    def at(point: Point) -> tuple[float, float]:
        return x(point.l0 or 0.0), y(float(getattr(point, score)))

    lines = [f"<figure><figcaption>{escape(AXES[score])}</figcaption>"]
    lines.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(AXES[score])} over L0">')
    for value in x_ticks:
        lines.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        lines.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">L0: active features per token</text>')
    path = " ".join("{:.1f},{:.1f}".format(*at(point)) for point in on_frontier(frontier, score))
    lines.append(f'<polyline class="frontier" points="{path}"/>')
    for number, points in enumerate(series(frontier).values()):
        for point in points:
            if point not in known:
                continue
            told = f"{point.label}: L0 {shown('l0', point.l0)}, {score} {shown(score, getattr(point, score))}"
            mark = _mark(number, *at(point), score in point.optimal)
            lines.append(
                f'<g tabindex="0" role="listitem" aria-label="{escape(told)}">{mark}<title>{escape(told)}</title></g>'
            )
    return "\n".join([*lines, "</svg></figure>"])


def _mark(number: int, x: float, y: float, full: bool) -> str:
    return f'<circle class="kind{number % KINDS}{"" if full else " open"}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'


def _ticks(values: list[float]) -> list[float]:
    """Round numbers that hold all values between them, two at least."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _table(table: list[list[str]], marked: list[str]) -> str:
    if not table:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
    body = "\n".join(
        f"<tr{' class=optimal' if row[0] in marked else ''}>"
        f'<th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
