"""The quickstart by the sparse and by the dense path: seconds of the whole run, and held-out NMSE; and the parts of a
step, the share of selection among them.

    python -m tests.benchmarks.quickstart --json

Each path is a run of its own process, as a user starts it; the dense path is what the run was before it was sparse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def measure(path: str, steps: int, folder: Path) -> dict[str, Any]:
    """A run of the quickstart."""
    command = [sys.executable, "-m", "clt_plugins", "run", str(ROOT / "examples/quickstart.toml"), "--out", str(folder)]
    command += ["--set", f"transcoder.path={path}", "--set", f"train.steps={steps}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/nmse" in line][-1]
    spent = [line for line in lines if "time/step_s" in line][1:]  # the first interval compiles
    return {
        "seconds": seconds,
        "step_s": sum(line["time/step_s"] for line in spent) / len(spent),
        "data_s": sum(line["time/data_s"] for line in spent) / len(spent),
        "nmse": last["eval/nmse"],
        "l0": last["eval/l0"],
        "never_active": last["eval/dead_fraction"],
    }


def pieces() -> dict[str, Any]:
    """The parts of a step at the quickstart's shape, with all that a run does in it, in the middle of the run."""
    shape = ["--layers=6", "--d-model=128", "--features=1024", "--batch=1024", "--k=96", "--whole", "--json"]
    command = [sys.executable, "-m", "tests.benchmarks.step", *shape]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout)
    parts = told["pieces"]
    return {"machine": told["machine"], "pieces": parts, "selection_share": parts["selection"] / parts["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quickstart", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found: dict[str, Any] = {path: measure(path, options.steps, Path(work) / path) for path in ("sparse", "dense")}
    sparse, dense = found["sparse"], found["dense"]
    found["times_faster"] = dense["seconds"] / sparse["seconds"]
    found["step_times_faster"] = dense["step_s"] / sparse["step_s"]
    found["nmse_ratio"] = sparse["nmse"] / dense["nmse"]
    found["step"] = pieces()
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
