"""How much of a planted model transcoders have: features, and the hops of its circuit, by decoder and penalty.

    python -m tests.benchmarks.planted --write
    python -m tests.benchmarks.planted --kinds boolean --tyings untied per_layer     # a part of it
    python -m tests.benchmarks.planted --kinds --write                               # none: the tables of what is there

Models of 3 layers and d_model 64 with 28 to 30 computed features (the source `planted`), transcoders of 32 features per
layer, 3 seeds, which make other models too. A finished run is stored in --out at once, and not made again. A record has
the combinations of which all seeds are there. One thread needs about half an hour for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from clt_plugins import run
from tests.benchmarks.timing import machine

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "examples" / "measurements"
SEEDS = (0, 1, 2)

BOOLEAN = {"chains": 10, "hops": 3, "gates": ["and", "copy", "or", "and_not"], "active": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    "easy": {},
    "boolean": BOOLEAN,
    "consumed": {**BOOLEAN, "consume": True},
    "hierarchical": {"activity": "hierarchical", "chains": 28},
    "correlated": {"activity": "correlated", "group": 5},
    "norms": {"norms": 100.0},
}
"""Kind -> the source's settings."""

K = {"boolean": 4, "consumed": 4}
"""The L0 that is asked for: about as many computed features are active at a token on average; else 3."""

TYINGS = ("untied", "per_source", "per_layer")


def penalties(k: int) -> dict[str, dict[str, Any]]:
    """Penalty -> the recipe's tables."""
    batchtopk = {"name": "batchtopk", "k": k}
    jumprelu = {"name": "jumprelu", "threshold": 0.3, "bandwidth": 0.5}
    return {
        "batchtopk": {"activation": batchtopk},
        "matryoshka": {"activation": batchtopk, "losses": ["mse", "matryoshka", "auxk"]},
        "hierarchical": {"activation": batchtopk, "losses": ["mse", "hierarchical", "auxk"]},
        "jumprelu, l0": {"activation": jumprelu, "losses": ["mse", {"name": "l0", "target": float(k)}, "auxk"]},
        "jumprelu, tanh": {
            "activation": jumprelu,
            "losses": ["mse", {"name": "tanh_sparsity", "weight": 0.1}, "auxk"],
        },
    }


PENALTIES = tuple(penalties(1))
NUMBERS = (
    "nmse",
    "l0",
    "mcc",
    "recovered",
    "closest",
    "decoder_mcc",
    "kept",
    "direct",
    "rewritten",
    "other",
    "written",
    "absorption",
    "splitting",
)


def tables(kind: str, tying: str, penalty: str, seed: int, steps: int) -> dict[str, Any]:
    """The recipe of a run. What it does not say are the defaults."""
    return {
        "name": "planted",
        "seed": seed,
        "source": {"name": "planted", **KINDS[kind]},
        "transcoder": {"features": 32, "device": "cpu"},
        "tying": tying,
        **penalties(K.get(kind, 3))[penalty],
        "train": {
            "steps": steps,
            "batch_tokens": 256,
            "statistics_tokens": 8192,
            "log_every": steps,
            "eval_every": steps,
            "eval_tokens": 512,
            "checkpoint_every": steps,
        },
        "loggers": [],
        "stages": [{"name": "recovery", "tokens": 8192}],
    }


def measure(kind: str, tying: str, penalty: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """One run's figures, made now or earlier; None if it was not made and is not to be."""
    recipe = tables(kind, tying, penalty, seed, options.steps)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    file = options.out / f"{kind}-{tying}-{penalty.replace(', ', '-')}-{seed}-{digest}.json"
    if not file.is_file():
        wanted = (kind in options.kinds, tying in options.tyings, penalty in options.penalties, seed in options.seeds)
        if not all(wanted):
            return None
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            run(recipe, out=Path(folder) / "run")
            told = json.loads((Path(folder) / "run" / "recovery" / "recovery.json").read_text())
        numbers = {name: told[name] for name in NUMBERS}
        gates: dict[str, list[dict[str, float]]] = {}
        for hop in told["hops"]:
            gates.setdefault(hop["gate"], []).append(hop)
        by_gate = {gate: {name: sum(hop[name] for hop in hops) for name in KEPT} for gate, hops in gates.items()}
        what = {"kind": kind, "tying": tying, "penalty": penalty, "seed": seed, "commit": commit()}
        record = {**what, **numbers, "by_gate": by_gate, "cpu_s": round(time.process_time() - begun, 1)}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(file)
        print(file.stem, json.dumps(numbers), file=sys.stderr, flush=True)
    return json.loads(file.read_text())


KEPT = ("kept", "direct", "rewritten", "other")


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def spread(values: list[float | None], form: str = ".2f") -> str:
    """Mean, and half of the distance between the least and the largest."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return ""
    return f"{statistics.mean(numbers):{form}} ± {(max(numbers) - min(numbers)) / 2:{form}}"


def combinations(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The runs of each kind, tying and penalty of which all seeds are there."""
    out: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for kind in KINDS:
        for tying in TYINGS:
            for penalty in PENALTIES:
                key = kind, tying, penalty
                own = [one for one in runs if (one["kind"], one["tying"], one["penalty"]) == key]
                if len(own) == len(SEEDS):
                    out[key] = own
    return out


def record(what: str, runs: list[dict[str, Any]], columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    on = machine()
    return {
        "what": what,
        "date": date.today().isoformat(),
        "machine": f"{on['cores']} CPU cores ({platform.machine()}), one thread, no GPU, torch {torch.__version__}",
        "command": "python -m tests.benchmarks.planted --write",
        "commit": commit(),
        "columns": columns,
        "rows": rows,
        "runs": runs,
    }


def features_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is recovered: a row for each kind, tying and penalty."""
    rows = []
    for (kind, tying, penalty), own in combinations(runs).items():
        names = ("nmse", "l0", "mcc", "recovered", "decoder_mcc", "absorption", "splitting")
        forms = (".3f", ".1f", *[".2f"] * 5)
        cells = [spread([one[name] for one in own], form) for name, form in zip(names, forms, strict=True)]
        rows.append([kind, f"`{tying}`", penalty, *cells])
    what = f"Features of planted models that transcoders recover: mean and half the range of {len(SEEDS)} seeds."
    columns = ["kind", "tying", "penalty", "NMSE", "L0", "MCC", "recovered", "decoder MCC", "absorption", "splitting"]
    return record(what, [one for own in combinations(runs).values() for one in own], columns, rows)


def hops_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of chains: a row for each kind that has some, tying and penalty."""
    rows, shown = [], []
    for (kind, tying, penalty), own in combinations(runs).items():
        if "hops" not in KINDS[kind]:
            continue
        shown += [{name: one[name] for name in ("kind", "tying", "penalty", "seed")} for one in own]
        cells = [spread([one[name] for one in own]) for name in KEPT]
        gates = [spread([_share(one["by_gate"][gate]) for one in own]) for gate in ("copy", "and", "or", "and_not")]
        rows.append([kind, f"`{tying}`", penalty, *cells, *gates])
    what = (
        "Hops A -> B -> C of planted models: shares of what is written of C, by what reads it; and what is kept of "
        f"hops by C's gate. Mean and half the range of {len(SEEDS)} seeds; the runs are those in `planted.json`."
    )
    columns = ["kind", "tying", "penalty", *KEPT, "kept: copy", "and", "or", "and_not"]
    return record(what, shown, columns, rows)


def _share(sums: dict[str, float]) -> float | None:
    total = sum(sums.values())
    return sums["kept"] / total if total > 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.planted", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/planted"), help="the folder of finished runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kinds", nargs="*", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--tyings", nargs="*", choices=TYINGS, default=TYINGS)
    parser.add_argument("--penalties", nargs="*", choices=PENALTIES, default=PENALTIES)
    parser.add_argument("--seeds", nargs="*", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.add_argument("--write", action="store_true", help=f"write them into {MEASUREMENTS.relative_to(ROOT)}")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every = [
        (kind, tying, penalty, seed) for kind in KINDS for penalty in PENALTIES for tying in TYINGS for seed in SEEDS
    ]
    made = [measure(*one, options) for one in every]
    runs = [one for one in made if one is not None]
    records = {"planted": features_table(runs), "planted-hops": hops_table(runs)}
    for name, one in records.items():
        if options.write:
            (MEASUREMENTS / f"{name}.json").write_text(json.dumps(one, indent=1, ensure_ascii=False) + "\n")
        for line in one["rows"]:
            print("  ".join(line))
    if options.json:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
