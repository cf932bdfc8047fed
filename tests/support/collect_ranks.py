"""What each of two ranks does for `tests/plugins/collect/test_ranks.py`: collect, with features split over two ranks,
and with batches dealt to two; and once more after all were killed.

Started as `python -m tests.support.collect_ranks FOLDER`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clt_collect import log as log_module
from clt_parallel.grid import Grid
from clt_plugins import Single
from clt_plugins.model.assemble import Parts, assemble
from tests.support.collect_truth import collect
from tests.support.helpers import ACTIVATIONS, recipe, stir
from tests.support.rank_cases import cut

TOKENS = 150
"""Held-out tokens: of two data ranks one has a batch more."""
SETTINGS = {"top": 4, "groups": 2, "per_group": 2, "window": 3, "distinct": 1, "coactive": 3, "coactive_tokens": 9}
CASES = ["jumprelu", "batchtopk", "topk"]
GEOMETRY = "topk"
"""The case with geometry too, for which tensor ranks put the transcoder together."""
SPLITS = {"tensor": (1, 2), "data": (2, 1)}
"""Data × tensor ranks."""


def settings(activation: str) -> dict[str, Any]:
    """Of the stage."""
    return {**SETTINGS, "tokens": TOKENS, "geometry": activation == GEOMETRY}


def built(folder: Path, activation: str, parallel: Any) -> Parts:
    """A transcoder and a stream in float64, so that products do not depend on how they are split."""
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 24, "held_out": 0.3, "model_batch": 4}
    made = assemble(
        recipe(
            model={"path": str(folder / "gpt2")},
            source={**source, "buffer_tokens": 64},
            transcoder={"features": 11, "dtype": "float64"},
            activation=ACTIVATIONS[activation],
            kernels={"name": "torch"},
            train={"batch_tokens": 32},
        ),
        parallel=parallel,
    )
    stir(made.transcoder)
    made.transcoder.eval()
    return made


def part(folder: Path, activation: str, grid: Grid) -> Parts:
    """This rank's part of the same transcoder."""
    whole, made = built(folder, activation, Single()), built(folder, activation, grid)
    with torch.no_grad():
        for key, value in cut(whole.transcoder, grid).items():
            cut(made.transcoder)[key].copy_(value)
    return made


def killed(store: Path, folder: Path, activation: str, grid: Grid, shards: int) -> None:
    """All ranks end after some shards; rank 1 has not committed its last one."""
    original, count = log_module.Log.write, 0

    def write(log: Any, *args: Any, **options: Any) -> None:
        nonlocal count
        if count == shards:
            raise KeyboardInterrupt
        count += 1
        if not (grid.rank == 1 and count == shards):
            original(log, *args, **options)

    log_module.Log.write = write  # type: ignore[method-assign]
    try:
        collect(part(folder, activation, grid), store, parallel=grid, ranks="all", **settings(activation))
    except KeyboardInterrupt:
        return
    finally:
        log_module.Log.write = original  # type: ignore[method-assign]
    raise AssertionError("not killed")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    alone, both = [dist.new_group([each]) for each in range(2)], dist.new_group([0, 1])
    log_module.SHARD = 1
    for name, (data, tensor) in SPLITS.items():
        groups = {"features": both if tensor == 2 else alone[rank], "tokens": both if data == 2 else alone[rank]}
        grid = Grid(rank, tensor, data, {**groups, "all": both})
        for activation in CASES:
            store = folder / f"{name}-{activation}"
            collect(part(folder, activation, grid), store, parallel=grid, ranks="all", **settings(activation))
        store = folder / f"{name}-killed"
        killed(store, folder, CASES[0], grid, 2)
        dist.barrier()
        collect(part(folder, CASES[0], grid), store, parallel=grid, ranks="all", **settings(CASES[0]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
