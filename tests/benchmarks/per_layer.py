"""Per-layer and cross-layer transcoders of the shipped model at equal parameters: what each explains, by seed.

    python -m tests.benchmarks.per_layer --json
    python -m tests.benchmarks.per_layer --write        # the table in the documents

Both are trained by the quickstart's recipe, on the same tokens, with the same k. A feature of a cross-layer transcoder
(tying `untied`) has an encoder row and a row for each layer from its own on; one of a per-layer transcoder
(`per_layer`) has two rows. So the latter has more features. Runs that are in --out already are not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

from clt_plugins import run

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "quickstart.toml"
MEASUREMENTS = ROOT / "examples" / "measurements" / "per-layer.json"
LAYERS, FEATURES = 6, 1024
SEEDS = (0, 1, 2)


def rows(tying: str, features: int) -> int:
    """Rows of d_model numbers, encoder and decoder."""
    decoder = features * (LAYERS * (LAYERS + 1) // 2 if tying == "untied" else LAYERS)
    return LAYERS * features + decoder


CHOICES = {"untied": FEATURES, "per_layer": rows("untied", FEATURES) // (2 * LAYERS)}
"""Tying -> features per layer."""


def tables(tying: str, seed: int, steps: int) -> dict[str, Any]:
    """The quickstart's recipe with that tying and as many features as have the same parameters."""
    recipe = tomllib.loads(RECIPE.read_text())
    recipe["model"]["path"] = str(RECIPE.parent / recipe["model"]["path"])
    recipe["transcoder"]["features"] = CHOICES[tying]
    recipe["train"]["steps"] = steps
    return {**recipe, "seed": seed, "tying": {"name": tying}, "stages": [{"name": "evaluate"}]}


def measure(tying: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """One run's scores on held-out text."""
    folder = out / f"{tying}-{seed}"
    report = folder / "evaluation" / "evaluation.json"
    if not report.is_file():
        resume = "latest" if (folder / "recipe.toml").is_file() else None
        run(tables(tying, seed, steps), out=folder, resume=resume)
    told = json.loads(report.read_text())
    scores = {name: told[name] for name in ("nmse", "l0", "dead_fraction")}
    inside = told["model"]
    scores["ce_recovered"], scores["kl"] = inside["ce_recovered"], inside["kl"]["transcoder"]
    return {"tying": tying, "features": CHOICES[tying], "rows": rows(tying, CHOICES[tying]), "seed": seed, **scores}


def spread(values: list[float], form: str) -> str:
    """Mean, and half of the distance between the least and the largest."""
    return f"{statistics.mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"


def as_table(found: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The record that the documents' table is made from."""
    lines = []
    for tying, features in CHOICES.items():
        own = [one for one in found if one["tying"] == tying]
        cells = {
            name: spread([one[name] for one in own], form)
            for name, form in (
                ("nmse", ".4f"), ("l0", ".1f"), ("dead_fraction", ".2%"), ("ce_recovered", ".2%"), ("kl", ".4f"),
            )
        }  # fmt: skip
        lines.append([f"`{tying}`", f"{features:,}", f"{own[0]['rows']:,}", *cells.values()])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "what": f"Held-out scores of the quickstart's recipe ({steps} steps) with both tyings at equal parameters: "
        f"mean and half the range of {len(SEEDS)} seeds.",
        "date": date.today().isoformat(),
        "machine": f"2 CPU cores ({platform.machine()}), no GPU",
        "command": "python -m tests.benchmarks.per_layer --write",
        "commit": commit,
        "columns": ["tying", "features per layer", "rows", "NMSE", "L0", "dead", "CE recovered", "KL"],
        "rows": lines,
        "runs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.per_layer", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/per-layer"), help="the folder of the runs")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--write", action="store_true", help=f"write it into {MEASUREMENTS.relative_to(ROOT)}")
    options = parser.parse_args()
    found = [measure(tying, seed, options.steps, options.out) for seed in SEEDS for tying in CHOICES]
    record = as_table(found, options.steps)
    if options.write:
        MEASUREMENTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for line in record["rows"]:
        print("  ".join(line))
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
