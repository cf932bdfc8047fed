"""Systems in processes of their own that take their training steps in turn: this project and others."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import alternate

PEERS = Path(__file__).parent / "peers"


class Worker:
    """A system in its own process: answers each line on its input with the seconds of one step."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.step()  # set-up and a first step

    def turn(self) -> float:
        """The seconds of a step, after an untimed one: the other system's turn has emptied the caches."""
        self.step()
        return self.step()

    def step(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("seconds "):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with status {self.process.wait()}")
        return float(line.split()[1])

    def close(self) -> float:
        """End it; gives its peak memory in GB."""
        out, _ = self.process.communicate("end\n")
        found = [line for line in out.splitlines() if line.startswith("peak_rss_gb ")]
        return float(found[-1].split()[1]) if found else float("nan")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """This project and others in turn: tokens per second of each, and how many times faster this one is."""
    base = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in SHAPE]
    own = [*base, f"--tying={options.tying}", f"--activation={options.activation}", f"--dtype={options.dtype}"]
    if options.whole:
        own += ["--whole", f"--progress={options.progress}", f"--dead={options.dead}"]
    workers = {"clt-plugins": _own_worker([*own, f"--kernels={options.kernels}"])}
    for name in options.against:
        if name == "dense":
            workers[name] = _own_worker([*own, "--path=dense"])
            continue
        script = PEERS / f"{name.replace('-', '_')}_step.py"
        if not script.is_file():
            raise SystemExit(f"--against {name}: no such system (known: dense, decode-clt, llamascopium)")
        workers[name] = Worker([options.against_python, str(script), *base], dict(os.environ))
    for worker in workers.values():
        worker.step()
    seconds = alternate({name: worker.turn for name, worker in workers.items()}, options.rounds)
    out: dict[str, Any] = {}
    for name, worker in workers.items():
        out[name] = {
            "tokens_per_s": options.batch / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "peak_rss_gb": worker.close(),
        }
    for name in options.against:
        pairs = zip(seconds[name], seconds["clt-plugins"], strict=True)
        out[name]["times_slower"] = statistics.median(other / ours for other, ours in pairs)
    return out


SHAPE = ("layers", "d-model", "features", "batch", "k", "threads")


def _own_worker(flags: list[str]) -> Worker:
    command = [sys.executable, "-m", "tests.benchmarks.step", "--worker", *flags]
    return Worker(command, dict(os.environ))
