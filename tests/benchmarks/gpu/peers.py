"""Other systems' steps on this GPU, where they are installed."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PEERS = Path(__file__).resolve().parents[1] / "peers"
SYSTEMS = {"decode-clt": ("clt", "decode_clt_step.py"), "llamascopium": ("llamascopium", "llamascopium_step.py")}
"""Name -> the package that it needs, and the script that takes its steps."""
WARMUP, ROUNDS = 3, 7
LIMIT = 90
"""Seconds for one system."""


def peers(device: torch.device, shape: Mapping[str, int]) -> dict[str, Any]:
    """The median milliseconds of a step of each system that is installed; for the others, why there is none.

    Args:
        shape: layers, d-model, features, batch, k.
    """
    out: dict[str, Any] = {}
    for name, (package, script) in SYSTEMS.items():
        if importlib.util.find_spec(package) is None:
            out[name] = "not installed"
            continue
        flags = [f"--{key}={value}" for key, value in shape.items()]
        command = [sys.executable, str(PEERS / script), *flags, "--threads=1", f"--device={device}"]
        lines = "step\n" * (WARMUP + ROUNDS) + "end\n"
        try:
            done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            out[name] = f"not done after {LIMIT} s"
            continue
        seconds = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds ")]
        if done.returncode or len(seconds) < WARMUP + ROUNDS:
            out[name] = "failed: " + (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        else:
            out[name] = {"step_ms": 1e3 * statistics.median(seconds[WARMUP:])}
    return out
