"""Long runs of tiny steps: memory and open files must stay what they are after the first quarter."""

from __future__ import annotations

import random
from collections.abc import Iterator

from clt_plugins.errors import ExitCode
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.tries import Result, Try

STEPS = 4000
COMMANDS = {
    f"run of {STEPS:,} steps": ("new", "r.toml"),
    f"run of {STEPS:,} steps on stored data": ("data", "stored.toml"),
    f"run of {STEPS:,} steps on text": ("language", "stream.toml"),
}
"""The folder and the recipe of each."""
SETTINGS = {"steps": STEPS, "checkpoint_every": 50, "log_every": 5, "eval_every": 50}
LEAK = "a long run"
GROWTH = 48 * 2**20
"""Bytes that may come after the first quarter: a forked child copies its parent's pages when it first writes to them. A
leak of 24 KiB per step is more."""
FILES = 6
"""Open files that come and go."""
LONG_S = 600.0


def pairs() -> list[tuple[str, str]]:
    return [(LEAK, command) for command in COMMANDS]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Once each."""
    yield "0"


def attempt(bench: Bench, one: Try) -> Result:
    """Watch memory and open files of a long run."""
    folder, recipe = COMMANDS[one.command]
    bench.fresh(folder)
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"train.{name}={value}")]
    ended = bench.run(("run", recipe, "--out", "r", *settings), timeout=LONG_S, samples=True)
    faults = oracle.ending(ended, {ExitCode.OK})
    quarter = len(ended.samples) // 4
    early, late = ended.samples[quarter : 2 * quarter], ended.samples[-quarter:]
    if not faults and quarter > 2:
        memory = [max(memory for memory, _ in part) for part in (early, late)]
        files = [max(files for _, files in part) for part in (early, late)]
        if memory[1] - memory[0] > GROWTH:
            faults.append(f"memory grows: {memory[0] >> 20} MiB, then {memory[1] >> 20} MiB")
        if files[1] - files[0] > FILES:
            faults.append(f"open files grow: {files[0]}, then {files[1]}")
    return Result(faults=faults, where=f"{len(ended.samples)} samples", ended=ended)
