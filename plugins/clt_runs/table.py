"""Runs as a table, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from clt_plugins import Refused, printable
from clt_runs import KEYS
from clt_runs.find import RunState

LONG = 160
"""Characters of an error that a table shows."""


def in_order(runs: Sequence[RunState], sort: str) -> list[RunState]:
    """The runs sorted by a column; those without it last, and equal ones by name.

    Raises:
        Refused: there is no such column.
    """
    key = sort.removeprefix("-")
    if key not in KEYS:
        raise Refused("--sort", f"no column {key!r}: one of {', '.join(KEYS)}")
    named = sorted(runs, key=lambda run: run.name)
    known = [run for run in named if getattr(run, key) is not None]
    known.sort(key=lambda run: getattr(run, key), reverse=sort.startswith("-"))
    return [*known, *(run for run in named if getattr(run, key) is None)]


def as_data(runs: Sequence[RunState]) -> str:
    """As JSON: a list of records, without recipes."""
    return json.dumps([_record(run) for run in runs], indent=2, allow_nan=False)


def _record(run: RunState) -> dict[str, Any]:
    record = attrs.asdict(run, filter=lambda a, _: a.name != "recipe")
    return {**record, "folder": str(run.folder)}


def as_table(runs: Sequence[RunState], folder: Path) -> str:
    """As text: a line for each run, and one for each fault."""
    if not runs:
        return f"no runs below {folder}"
    rows = [list(COLUMNS), *([printable(show(run)) for show in COLUMNS.values()] for run in runs)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(COLUMNS))]
    lines = []
    for run, row in zip([None, *runs], rows, strict=True):
        texts, numbers = row[:2], row[2:]
        cells = [cell.ljust(width) for cell, width in zip(texts, widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        for note in [] if run is None else [run.detail, *run.faults]:
            if note:
                lines.append(f"    {printable(note if len(note) <= LONG else note[:LONG] + '...')}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _step(run: RunState) -> str:
    return f"{_number(run.step, ',')} / {_number(run.steps, ',')}"


def age(seconds: float | None) -> str:
    """A time in its largest unit: `3 min`."""
    if seconds is None:
        return "-"
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


def size(count: int) -> str:
    """Bytes in their largest unit: `3.4 GB`."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


COLUMNS: dict[str, Callable[[RunState], str]] = {
    "name": lambda run: run.name,
    "status": lambda run: run.status,
    "step": _step,
    "NMSE": lambda run: _number(run.nmse, ".4f"),
    "L0": lambda run: _number(run.l0, ".1f"),
    "CE recovered": lambda run: _number(run.ce_recovered, ".1%"),
    "tokens/s": lambda run: _number(run.tokens_per_s, ",.0f"),
    "age": lambda run: age(run.age),
    "size": lambda run: size(run.size),
}
"""What a table shows, by the head of the column."""
