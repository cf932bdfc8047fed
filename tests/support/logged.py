"""What tests log, and what they read again from the files of loggers."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import attrs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clt_plugins import Context
from tests.support.commands import python
from tests.support.helpers import plugins

RECIPE: dict[str, Any] = {
    "name": "small",
    "activation": {"name": "topk", "k": 8},
    "losses": [{"name": "mse", "weight": 1.0}, {"name": "auxk", "weight": 0.5}],
    "train": {"steps": 12, "lr": 1e-3, "betas": [0.9, 0.999], "nesterov": True},
}


def logger(name: str, context: Context, folder: Path, **settings: Any) -> Any:
    spec = plugins().pick("loggers", name).spec
    return spec.build(spec.config(**settings), attrs.evolve(context, folder=folder))


def metrics(step: int) -> dict[str, Any]:
    """As the engine logs them; every number depends on the step."""
    return {"tokens": 16 * step, "loss/total": 1 / step, "train/nmse_by_layer": torch.tensor([0.5, 0.25]) / step}


def evaluation(step: int, layers: int = 2) -> dict[str, Any]:
    density = torch.full((layers, 6), 1e-3)
    density[0, 0], density[0, 1] = 0.0, 0.1
    nmse = torch.arange(1.0, layers + 1) / 16 / step
    return {"eval/nmse": float(nmse.mean()), "eval/nmse_by_layer": nmse, "eval/density": density}


def log_steps(sink: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        sink.log(step, metrics(step))


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(folder: Path) -> list[Any]:
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    # 0: keep everything.
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in events.Scalars(tag)]


def in_a_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in which `context`, `folder`, `logger`, `metrics` and this file's other helpers are defined."""
    start = f"""
        import os, resource, signal, sys
        from pathlib import Path
        from tests.support.helpers import parts
        from tests.support.logged import *
        context, folder = parts().context, Path({str(folder)!r})
        """
    return python("-c", textwrap.dedent(start) + textwrap.dedent(script), cwd=Path(__file__).parents[2])
