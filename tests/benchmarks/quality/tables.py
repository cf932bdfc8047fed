"""Results as the records that the documents' tables are made from (`tests.support.tables`)."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tests.benchmarks.quality.setups import ROOT

MEASUREMENTS = ROOT / "examples" / "measurements"

COLUMNS = {
    "nmse_choose": ("NMSE, choose", ".4f"),
    "nmse_report": ("NMSE", ".4f"),
    "l0_report": ("L0", ".1f"),
    "dead_fraction_report": ("dead", ".1%"),
    "dead_fraction_training": ("dead at the end of training", ".1%"),
    "ce_recovered": ("CE recovered", ".1%"),
    "kl": ("KL", ".3f"),
    "cpu_step_s": ("processor s/step", ".3f"),
}
"""Figure -> its column and format."""


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and half of the distance between the least and the largest; "-" where one is not defined."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "-"
    mean = f"{statistics.mean(numbers):{form}}"
    return mean if len(numbers) == 1 else f"{mean} ± {(max(numbers) - min(numbers)) / 2:{form}}"


def cells(runs: Sequence[dict[str, Any]], figures: Iterable[str]) -> list[str]:
    """A row's figures over seeds."""
    return [spread([run.get(name) for run in runs], COLUMNS[name][1]) for name in figures]


def ratio(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], figure: str = "nmse_report") -> str:
    """A figure over that of the base with the same seed; "-" where no seed has both."""
    of_base = {run["seed"]: run[figure] for run in base}
    values = [run[figure] / of_base[run["seed"]] for run in runs if run["seed"] in of_base]
    return spread(values, ".3f")


def write(
    name: str, what: str, command: str, columns: Sequence[str], rows: Sequence[Sequence[str]], runs: Iterable[Any]
) -> Path:
    """Write `examples/measurements/NAME.json`."""
    raw = _without_settings(runs)
    record = {
        "what": what,
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": command,
        "commit": ", ".join(sorted({run["commit"] for run in raw})),
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "runs": raw,
    }
    return _store(name, record)


def keep(name: str, runs: Iterable[Any]) -> Path:
    """Put runs beside a table that stays as it is: too few are there for a new one."""
    return _store(name, {**_record(name), "unfinished": _without_settings(runs)})


def written(name: str) -> list[dict[str, Any]]:
    """The runs of a table that was written, or that were kept for the next one."""
    record = _record(name)
    return [*record.get("runs", []), *record.get("unfinished", [])]


def _record(name: str) -> dict[str, Any]:
    path = MEASUREMENTS / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def _store(name: str, record: dict[str, Any]) -> Path:
    path = MEASUREMENTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _without_settings(runs: Iterable[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in run.items() if key != "settings"} for run in runs]


def machine() -> str:
    """This machine in general terms."""
    import torch

    instructions = torch.backends.cpu.get_cpu_capability().replace("AVX", "AVX-")
    return f"{os.cpu_count()} CPU cores ({platform.machine().replace('_', '-')}, {instructions}), no GPU"
