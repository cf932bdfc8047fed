"""Training curves from the lines that the logger `jsonl` wrote, thinned to a number of points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.files.untrusted import opened, parse_json

POINTS = 500
"""Points of a curve that are kept, at most."""

NAMES = 500
"""Curves that are kept, at most."""

LONGEST = 2**24
"""Bytes of the longest line that is read."""


@attrs.frozen(kw_only=True)
class Curve:
    """A metric over training: some of its points, always with the first and the last."""

    step: list[int]
    """Ascending, [points]."""
    value: list[Any]
    """A number at each point, or a list of numbers (one per layer); None where it was not finite."""


@attrs.define
class _Thinned:
    """Keeps every `stride`-th point of a curve that comes one point at a time, in bounded memory."""

    step: list[int] = attrs.field(factory=list)
    value: list[Any] = attrs.field(factory=list)
    stride: int = 1
    seen: int = 0
    last: tuple[int, Any] | None = None

    def add(self, step: int, value: Any, points: int) -> None:
        self.last = (step, value)
        if self.seen % self.stride == 0:
            self.step.append(step)
            self.value.append(value)
        self.seen += 1
        if len(self.step) >= points:
            self.stride *= 2
            del self.step[1::2], self.value[1::2]

    def curve(self) -> Curve:
        if self.last is not None and self.step[-1] != self.last[0]:
            self.step.append(self.last[0])
            self.value.append(self.last[1])
        return Curve(step=self.step, value=self.value)


def read_curves(file: Path, points: int = POINTS) -> tuple[dict[str, Curve], list[str]]:
    """The curves of a `metrics.jsonl`, by name, and a note for what could not be read.

    Where a step comes again, as after a resumption by another logger, the curve begins anew from there.

    Raises:
        Refused: there is no such file.
        OSError: it cannot be read.
    """
    curves: dict[str, _Thinned] = {}
    bad, left_out = 0, set()
    for entry in _entries(file):
        step = entry.get("step") if isinstance(entry, Mapping) else None
        if type(step) is not int:
            bad += 1
            continue
        for name, value in entry.items():
            if name == "step" or not _is_curve(value):
                continue
            curve = curves.get(name)
            if curve is None:
                if len(curves) >= NAMES:
                    left_out.add(name)
                    continue
                curve = curves[name] = _Thinned()
            if curve.last is not None and step <= curve.last[0]:
                _cut(curve, step)
            curve.add(step, value, points)
    notes = [f"{file.name}: {bad} lines could not be read"] if bad else []
    if left_out:
        notes.append(f"{file.name}: {len(left_out)} of {NAMES + len(left_out)} curves are left out")
    return {name: curve.curve() for name, curve in curves.items()}, notes


def _entries(file: Path) -> Iterator[Any]:
    """What the lines hold; None for one that is not JSON. A last line that was not finished is left out."""
    with opened(file) as lines:
        while line := lines.readline(LONGEST):
            if not line.endswith(b"\n"):
                if len(line) < LONGEST:
                    return
                while (rest := lines.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                yield None
                continue
            try:
                yield parse_json(line)
            except ValueError:
                yield None


def _is_curve(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(one is None or (isinstance(one, int | float) and one is not True) for one in numbers)


def _cut(curve: _Thinned, step: int) -> None:
    """Drop what was logged from a step on."""
    while curve.step and curve.step[-1] >= step:
        curve.step.pop()
        curve.value.pop()
    curve.last, curve.seen = None, len(curve.step) * curve.stride  # so that the next point is kept
