"""Complete runs on 1 to 4 ranks: resumed on other numbers of ranks, steered to an L0, and on stored rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from clt_parallel.grid import Grid
from clt_plugins import StoredSource, run
from clt_plugins.data.batch import Batch
from tests.support.helpers import plugins, tables

RUN: dict[str, Any] = {
    "transcoder": {"dtype": "float64", "features": 11},
    "losses": [{"name": "mse"}, {"name": "auxk"}, {"name": "tanh_sparsity"}],
    "train": {"log_every": 1, "clip_norm": 0.5, "dead_after_tokens": 16},
    "callbacks": [
        {"name": "exemplar_start"},
        {"name": "resample", "every": 3, "tokens": 48, "until": 1.0},
        {"name": "decoder_norm", "norm": 0.6},
        {"name": "ema", "decay": 0.8},
    ],
}
RUNS: list[tuple[str, int, dict[str, Any]]] = [("two", 2, {}), ("1", 1, {}), ("3", 3, {}), ("2x2", 4, {"data": 2})]
"""Name, ranks, settings of `[parallel]`."""


STEERED: dict[str, Any] = {
    "transcoder": {"dtype": "float64", "features": 11},
    "activation": {"name": "jumprelu", "target_l0": 6},
    "losses": [{"name": "mse"}, {"name": "tanh_sparsity"}],
    "train": {"log_every": 1},
}
"""A run that is steered to an L0, on 2 × 2 ranks."""


STORED = "stored"
"""The folder of a data set of 100 rows, three layers of six dimensions, that the next runs read."""
STORED_RUNS: list[tuple[str, int, int]] = [("rows-2", 2, 0), ("rows-3", 3, 2), ("rows-4", 4, 5), ("rows-1", 1, 7)]
"""Name, data ranks, and the step of the run before at which it goes on; all have 9 steps of 12 tokens."""


def runs(folder: Path, rank: int, ports: list[str]) -> None:
    """A run on two ranks, and from its first checkpoint on 1, 3 and 2 × 2, of which those split the tokens that share
    the features."""

    def splitting(*args: Any, **kwargs: Any) -> Grid:
        return Grid(*args, **kwargs | {"splits_tokens": True})

    whole_run = folder / "two"
    for port, (name, world, parallel) in zip(ports, RUNS, strict=True):
        os.environ.update(WORLD_SIZE=str(world), MASTER_PORT=port)
        if rank == 0 and name != "two":
            shutil.copytree(whole_run, folder / name)
            shutil.rmtree(folder / name / "transcoder")
        if rank < world:
            changed = tables(**RUN, parallel={"name": "tensor", **parallel})
            with mock.patch("clt_parallel.connect.Grid", splitting if name == "2x2" else Grid):
                run(changed, out=folder / name, resume=None if name == "two" else "step_000004", plugins=plugins())


def steered_run(folder: Path, rank: int, port: str) -> None:
    """The run of `STEERED`."""
    os.environ.update(WORLD_SIZE="4", MASTER_PORT=port)
    changed = tables(**STEERED, parallel={"name": "tensor", "data": 2})
    run(changed, out=folder / "steered", plugins=plugins())


def stored_runs(folder: Path, rank: int, ports: list[str]) -> None:
    """Runs on stored rows, each resumed from a checkpoint of the one before; saves the rows that each rank read."""
    read: list[list[int]] = []
    original = StoredSource.next

    def recording(source: StoredSource) -> Batch:
        batch = original(source)
        assert batch.token_ids is not None
        read.append(batch.token_ids.tolist())
        return batch

    StoredSource.next = recording  # type: ignore[method-assign]
    before = ""
    for port, (name, world, step) in zip(ports, STORED_RUNS, strict=True):
        os.environ.update(WORLD_SIZE=str(world), MASTER_PORT=port)
        if rank == 0 and before:
            shutil.copytree(folder / before, folder / name)
            shutil.rmtree(folder / name / "transcoder")
        if rank < world:
            read.clear()
            changed = tables(
                source={"name": "local", "path": str(folder / STORED), "buffer_tokens": 16},
                loggers=[],
                parallel={"name": "tensor", "data": world},
                train={"steps": 9, "batch_tokens": 12, "checkpoint_every": 1, "eval_every": 9, "eval_tokens": 10},
            )
            run(changed, out=folder / name, resume=f"step_{step:06}" if before else None, plugins=plugins())
            (folder / f"{name}-{rank}.json").write_text(json.dumps(read))
        before = name
    StoredSource.next = original  # type: ignore[method-assign]
