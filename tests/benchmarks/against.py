"""The table of the README that compares a training step with that of other systems.

    python -m tests.benchmarks.against --folder runs/against --decode-clt PYTHON --llamascopium PYTHON --write

PYTHON is an interpreter that has the other system. Each comparison is a run of `tests.benchmarks.step` and a file in
the folder; one that is there is not run again. A machine that does nothing else gives the best figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import attrs

from tests.benchmarks.quality.one import commit
from tests.benchmarks.quality.tables import MEASUREMENTS, machine

ROOT = Path(__file__).parents[2]
BATCHES = (512, 2048)
K = 200


@attrs.frozen
class Comparison:
    """A row of the table."""

    name: str
    label: str
    system: str
    """What `tests.benchmarks.step --against` calls it."""
    options: tuple[str, ...] = ()


ROWS = (
    Comparison("decode-clt", "crosslayer-coding 0.0.1 (`decode-clt`), float32", "decode-clt"),
    Comparison("decode-clt-bf16", "the same; our encoder product in bfloat16", "decode-clt", ("--dtype=bf16",)),
    Comparison("llamascopium", "llamascopium 2.0.0b34, sparse decoding (CSR)", "llamascopium"),
    Comparison("dense", "our own dense path", "dense"),
)


def run(row: Comparison, batch: int, python: str, out: Path) -> None:
    """Compare, and store what the benchmark prints."""
    command = [sys.executable, "-m", "tests.benchmarks.step", f"--batch={batch}", f"--k={K}", *row.options, "--json"]
    command += [f"--against={row.system}", f"--against-python={python}", f"--rounds={5 if batch < 2048 else 3}"]
    printed = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps({**json.loads(printed.splitlines()[-1]), "commit": commit()}), encoding="utf-8")
    partial.replace(out)


def table(folder: Path) -> dict[str, Any]:
    """The record of `examples/measurements/step.json`."""
    found = {(row.name, batch): _read(folder, row, batch) for row in ROWS for batch in BATCHES}
    rows = []
    for row in ROWS:
        both = [found[row.name, batch] for batch in BATCHES]
        if any(both):
            rows.append([row.label, *("not measured" if one is None else times(one, row.system) for one in both)])
    ours = [[run for (_, of), run in found.items() if of == batch and run is not None] for batch in BATCHES]
    rows.append(["our step over its roofline, float32", *(_over(runs) for runs in ours)])
    rows.append(["`decode-clt` over that roofline", *(_limit(found["decode-clt", batch]) for batch in BATCHES)])
    measured = [one for one in found.values() if one is not None]
    return {
        "what": WHAT.format(k=K, bandwidth=statistics.median(run["roofline"]["read_gb_per_s"] for run in measured)),
        "date": date.today().isoformat(),
        "machine": machine(),
        "command": "python -m tests.benchmarks.against --folder FOLDER --decode-clt PYTHON --llamascopium PYTHON",
        "commit": ", ".join(sorted({run["commit"] for run in measured})),
        "columns": ["compared with", *(f"batch {batch}" for batch in BATCHES)],
        "rows": rows,
        "runs": [{"comparison": name, **run} for (name, _), run in found.items() if run is not None],
    }


def times(run: dict[str, Any], system: str) -> str:
    """How many times faster ours is, with the least and the most of the alternating steps."""
    ratios = [
        other / ours
        for other, ours in zip(run["against"][system]["seconds"], run["against"]["clt-plugins"]["seconds"], strict=True)
    ]
    return f"{statistics.median(ratios):.1f} × ({min(ratios):.1f}–{max(ratios):.1f})"


def _over(runs: list[dict[str, Any]]) -> str:
    plain = [run["over_roofline"] for run in runs if run["settings"]["dtype"] == "fp32"]
    return f"{statistics.median(plain):.2f} ×" if plain else "not measured"


def _limit(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not measured"
    return f"{statistics.median(run['against']['decode-clt']['seconds']) / run['roofline']['seconds']:.1f} ×"


def _read(folder: Path, row: Comparison, batch: int) -> dict[str, Any] | None:
    path = folder / f"{row.name}-{batch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


WHAT = (
    "How many times faster a whole training step is (forward, backward, fused Adam): BatchTopK, 12 layers × 768, 3,072 "
    "features per layer, {k} active per token. Medians of alternating steps of two processes, and their range. The "
    "roofline is the encoder's product, a read of the active rows for each of three products at {bandwidth:.0f} GB/s, "
    "and Adam, as measured in the same run."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.against", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--decode-clt", metavar="PYTHON")
    parser.add_argument("--llamascopium", metavar="PYTHON")
    parser.add_argument("--write", action="store_true", help="write examples/measurements/step.json")
    options = parser.parse_args()
    pythons = {"decode-clt": options.decode_clt, "llamascopium": options.llamascopium, "dense": sys.executable}
    options.folder.mkdir(parents=True, exist_ok=True)
    for row, batch in product(ROWS, BATCHES):
        out = options.folder / f"{row.name}-{batch}.json"
        if pythons[row.system] and not out.is_file():
            run(row, batch, pythons[row.system], out)
            print(f"{row.label}, batch {batch}: {times(json.loads(out.read_text()), row.system)}", flush=True)
    record = json.dumps(table(options.folder), indent=1, ensure_ascii=False) + "\n"
    if options.write:
        (MEASUREMENTS / "step.json").write_text(record, encoding="utf-8")
    else:
        print(record, end="")


if __name__ == "__main__":
    main()
