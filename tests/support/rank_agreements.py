"""What ranks agree on: each trial fails on one of 2 × 2 ranks, or differs between them, and every rank notes what it
then raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from clt_parallel.grid import Grid
from clt_plugins import Refused, parameter
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.agree import all_or_none, anyone, same_everywhere
from clt_plugins.distributed.generators import generator_states, set_generators
from clt_plugins.distributed.reading import Reading
from clt_plugins.errors import Stopped
from clt_plugins.files.folders import atomic_folder, check_folder
from clt_plugins.files.sliced import SUFFIX
from tests.support.helpers import random_batch


class Listed:
    """A source that yields some batches, and then fails."""

    def __init__(self, *batches: Batch):
        self.left = list(batches)

    def next(self) -> Batch:
        if not self.left:
            raise Refused("source.text", "'corpus' is gone")
        return self.left.pop(0)


def agreements(grid: Grid, folder: Path) -> dict[str, str]:
    """What a rank of 2 × 2 ranks raises when something fails on one of them."""
    rank = grid.rank
    good = random_batch(4, 3, 6, seed=grid.data_rank)
    swapped = good.rows(torch.tensor([1, 0, 2, 3]))

    other = attrs.evolve(good, inputs=good.inputs.clone())
    other.inputs[3, 1, 5] = torch.nextafter(good.inputs[3, 1, 5], torch.tensor(9.0))

    def reads(source: Listed) -> bool:
        """Two steps; a rank without a batch goes on with zeros to where the step is checked."""
        reading = Reading(source, grid, torch.device("cpu"))
        for _ in range(2):
            batch = reading.next()
            assert reading.error is None or not batch.inputs.any(), "not a batch of zeros"
            grid.total(batch.inputs.sum(0))  # what a step exchanges: all ranks must come
            reading.check()
        reading.compare()
        return True

    def asked() -> list[bool]:
        """Rank 1 is asked to stop in the second of four steps."""
        reading = Reading(Listed(*[good] * 4), grid, torch.device("cpu"))
        stops = []
        for step in range(4):
            reading.next()
            reading.check()
            stops.append(reading.stops(rank == 1 and step >= 1))
        return stops

    def disk_full() -> None:
        with all_or_none(grid):
            if rank == 2:
                raise OSError("no space left")

    def slow_writer() -> None:
        """Rank 1 gives its file the final name long after rank 0 has written its own."""
        with atomic_folder(folder / "slow", grid) as partial:
            if grid.data_rank == 0:
                written = partial / f".tmp{rank}"
                written.write_bytes(b"slice")
                time.sleep(0.5 * rank)
                written.rename(partial / f"t{SUFFIX.format(grid.tensor_rank, grid.tensor_ranks)}")
        check_folder(folder / "slow", ["t*"])

    def shared_parameter() -> list[float]:
        one = parameter(torch.zeros(2), None, partial_gradient=True)
        other = parameter(torch.zeros(3), None)
        one.grad, other.grad = torch.full((2,), float(rank)), torch.full((3,), float(rank))
        grid.reduce_gradients([one, other])
        return [*one.grad.tolist(), *other.grad.tolist()]

    def generators() -> list[bool]:
        """Whether draws go on after the states of all ranks were saved; and of another number of ranks."""
        torch.manual_seed(100 + rank)
        saved = generator_states(grid, torch.device("cpu"))
        expected = torch.rand(3)
        torch.manual_seed(0)
        set_generators(saved, grid, torch.device("cpu"))
        same = torch.equal(torch.rand(3), expected)
        set_generators({name: states[:2] for name, states in saved.items()}, grid, torch.device("cpu"))
        return [
            same,
            torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(100 + rank % 2))),
        ]

    trials: dict[str, Callable[[], Any]] = {
        "well": lambda: reads(Listed(good, good)),
        "failed read": lambda: reads(Listed(*[good] * (rank != 3))),
        "failed later": lambda: reads(Listed(*[good] * (2 - (rank == 3)))),
        "failed everywhere": lambda: reads(Listed()),
        "other order": lambda: reads(Listed(good, swapped if rank == 1 else good)),
        "other number": lambda: reads(Listed(good, other if rank == 2 else good)),
        "asked": asked,
        "plugins": lambda: same_everywhere(grid, "plugins", {"a": "1", **({"square": "2.0"} if rank == 2 else {})}),
        "disk": disk_full,
        "slow writer": slow_writer,
        "stop": lambda: anyone(grid, rank == 1) or "nobody",
        "shared": lambda: shared_parameter(),
        "generators": lambda: generators(),
        "go on": lambda: "nobody" if not anyone(grid, False) else "someone",
    }
    outcomes = {}
    for name, trial in trials.items():
        try:
            outcomes[name] = str(trial()) if name not in ("plugins", "disk", "slow writer") else str(trial() is None)
        except (ValueError, OSError, Stopped) as error:
            outcomes[name] = f"{type(error).__name__} {getattr(error, 'code', '')}: {error}"
    return outcomes
