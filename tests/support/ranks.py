"""What each of four processes does for `tests/plugins/parallel/test_parallel.py`: every case on grids of 1 to 4 ranks,
and complete runs on 1 to 4 ranks. Results are saved. The processes are started once, because that takes the longest.

Started as `python -m tests.support.ranks FOLDER PORT...`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clt_parallel.grid import Grid
from tests.support.rank_agreements import agreements
from tests.support.rank_cases import CASES, Case, one_pass, part, steps
from tests.support.rank_runs import RUNS, runs, steered_run, stored_runs

GRIDS = {"1": (1, 1), "2": (1, 2), "3": (1, 3), "4": (1, 4), "2x2": (2, 2), "3 split": (1, 3), "2x2 split": (2, 2)}
"""Data × tensor ranks; "split": tensor ranks split the tokens when they compute the error, as they do with nccl."""
EVERY = {"1": 2, "3": 2, "4": 4, "3 split": 3, "2x2 split": 4}
PASSES = [(name, case) for name in GRIDS for case in CASES[:: EVERY.get(name, 1)]]
"""Each case on each grid; some of them where all are on a grid that is much the same."""
TRAINED = [
    ("3", Case("jumprelu", "per_source-affine")),
    ("2x2 split", Case("batchtopk", "per_target", encoder="tied-scaled")),
]
"""What is trained for fifty steps, and on which grid: uneven parts of features, or both kinds of ranks."""


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank = dist.get_rank()
    for name, (data, tensor) in GRIDS.items():
        # Every process must make every group, whether it is in it or not.
        grid = torch.arange(data * tensor).view(data, tensor)
        rows = [dist.new_group(row.tolist()) for row in grid]
        columns = [dist.new_group(column.tolist()) for column in grid.T]
        everyone = dist.new_group(grid.flatten().tolist())
        if rank >= data * tensor:
            continue
        groups = {"features": rows[rank // tensor], "tokens": columns[rank % tensor], "all": everyone}
        ranks = Grid(rank, tensor, data, groups, splits_tokens="split" in name)
        results: dict[str, Any] = {
            case.name: one_pass(case, part(case, ranks)) for grid_of_case, case in PASSES if grid_of_case == name
        }
        trained = [case for grid_of_case, case in TRAINED if grid_of_case == name]
        results["trained"] = {case.name: steps(case, part(case, ranks)) for case in trained}
        torch.save(results, folder / f"{name}-{rank}.pt")
    torch.save(agreements(ranks, folder), folder / f"agreements-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    runs(folder, rank, ports[: len(RUNS)])
    stored_runs(folder, rank, ports[len(RUNS) : -1])
    steered_run(folder, rank, ports[-1])


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(Path(sys.argv[1]), sys.argv[2:])
