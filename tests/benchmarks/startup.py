"""Start-up of the command line with many plugins installed: `python -m tests.benchmarks.startup [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PLUGIN = '''
from typing import Literal
from attrs import field, frozen, validators
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """A term like any other."""
    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the term."""
    scope: Literal["all", "dead"] = "all"
    """Which features it is about."""

def build(config, context):
    raise AssertionError("nothing is built here")

@hookimpl
def clt_losses():
    return [Spec("loss{number}", Config, build)]
'''


def install(site: Path, count: int) -> None:
    """So many distributions with one plugin each, as an installer would leave them."""
    for number in range(count):
        (site / f"clt_loss{number}.py").write_text(PLUGIN.replace("{number}", str(number)))
        info = site / f"clt_loss{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: clt-loss{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[clt_plugins]\nloss{number} = clt_loss{number}\n")


def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Command -> the least wall and processor seconds of some rounds; the first, which compiles, is not counted."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), count)
        path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), folder])
        for command in ("--help", "plugins"):
            wall, processor = [], []
            for _ in range(rounds + 1):
                began, before = time.perf_counter(), os.times()
                done = subprocess.run(
                    [sys.executable, "-m", "clt_plugins", command],
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=120,
                )
                after = os.times()
                wall.append(time.perf_counter() - began)
                processor.append(
                    after.children_user + after.children_system - before.children_user - before.children_system
                )
            if command == "plugins":
                assert all(f"loss{number} - " in done.stdout for number in range(count))
            found[command] = {"wall_s": min(wall[1:]), "processor_s": min(processor[1:])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.plugins, options.rounds)
    if options.json:
        print(json.dumps({"plugins": options.plugins, **found}, indent=2))
        return
    for command, times in found.items():
        print(f"{command:10} {times['wall_s']:.3f} s wall, {times['processor_s']:.3f} s processor")


if __name__ == "__main__":
    main()
