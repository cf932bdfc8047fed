"""What each of four processes does for `tests/plugins/parallel/test_parallel.py`: every case on grids of 1 to 4 ranks,
and complete runs on 1 to 4 ranks. Results are saved. The processes are started once, because that takes the longest.

Started as `python -m tests.support.ranks FOLDER PORT...`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
import torch.distributed as dist

from clt_parallel.grid import Grid
from clt_plugins import Forward, Refused, StoredSource, parameter, run
from clt_plugins.contract.recipe import Recipe
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.agree import all_or_none, anyone, same_everywhere
from clt_plugins.distributed.generators import generator_states, set_generators
from clt_plugins.distributed.reading import Reading
from clt_plugins.errors import Stopped
from clt_plugins.files.folders import atomic_folder, check_folder
from clt_plugins.files.sliced import SUFFIX
from clt_plugins.model.assemble import Parts, assemble
from clt_plugins.model.devices import make_parallel
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.clip import clip_gradients, gradient_norm
from clt_plugins.training.optimizers.make import make_optimizer
from tests.support.helpers import ACTIVATIONS, ALL_LOSSES, ENCODERS, TYINGS, plugins, random_batch, recipe, stir, tables

GRIDS = {"1": (1, 1), "2": (1, 2), "3": (1, 3), "4": (1, 4), "2x2": (2, 2), "3 split": (1, 3), "2x2 split": (2, 2)}
"""Data × tensor ranks; "split": tensor ranks split the tokens when they compute the error, as they do with nccl."""
TOKENS, FEATURES = 12, 10
LOSSES = [
    *ALL_LOSSES,
    {"name": "preactivation", "weight": 0.3},
    {"name": "matryoshka", "weight": 0.4, "prefixes": [0.3, 0.6]},
    {"name": "depth", "weight": 0.2},
]
TYPES = {"float64": torch.float64, "float32": torch.float32}


@attrs.frozen
class Case:
    """One transcoder and its losses."""

    activation: str
    tying: str
    path: str = "sparse"
    dtype: str = "float64"
    losses: tuple[str, ...] = ("mse", "tanh_sparsity", "auxk")
    kernels: str = "torch"
    encoder: str = "plain"

    @property
    def name(self) -> str:
        return "-".join((self.activation, self.tying, self.path, self.dtype, *self.losses, self.kernels, self.encoder))

    def recipe(self) -> Recipe:
        return recipe(
            encoder=ENCODERS[self.encoder],
            activation=ACTIVATIONS[self.activation],
            tying=TYINGS[self.tying],
            losses=[loss for loss in LOSSES if loss["name"] in self.losses],
            transcoder={"features": FEATURES, "path": self.path, "dtype": self.dtype, "device": "cpu"},
            kernels={"name": self.kernels},
            train={"batch_tokens": TOKENS, "clip_norm": 0.5, "lr": 1e-3, "steps": 50},
        )


CASES = [
    *(Case(activation, "untied") for activation in ACTIVATIONS),
    *(Case("topk", tying) for tying in TYINGS if tying != "untied"),
    *(Case(activation, "per_source-affine") for activation in ("jumprelu", "batchtopk-norm")),
    *(Case(activation, "per_target-affine", dtype="float32") for activation in ("jumprelu", "batchtopk", "topk")),
    *(Case(activation, "untied-skip", path="dense") for activation in ("relu", "jumprelu", "batchtopk")),
    Case("batchtopk", "untied-skip", kernels="numba"),
    Case("batchtopk", "untied-skip", losses=("mse", "auxk", "preactivation")),
    Case("topk", "untied-skip", losses=("auxk", "matryoshka", "depth")),
    *(Case("batchtopk", "untied", encoder=encoder) for encoder in ENCODERS if encoder != "plain"),
]
PASSES = [(name, case) for name in GRIDS for case in (CASES[::4] if name in ("4", "2x2 split") else CASES)]
"""Each case on each grid; every fourth where all others are on a grid that is much the same."""
TRAINED = [
    ("3", Case("jumprelu", "per_source-affine")),
    ("2x2 split", Case("batchtopk", "per_target", encoder="tied-scaled")),
]
"""What is trained for fifty steps, and on which grid: uneven parts of features, or both kinds of ranks."""


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


def idle_tokens(layers: int = 3) -> torch.Tensor:
    """Some features are dead, so that AuxK has something to do."""
    idle = torch.zeros(layers, FEATURES, dtype=torch.int64)
    idle[:, ::3] = 1000
    return idle


def whole(case: Case) -> Parts:
    """The case in one process, with every parameter stirred."""
    built = assemble(case.recipe(), parallel=make_parallel("single", plugins()))
    stir(built.transcoder)
    return built


def part(case: Case, grid: Grid) -> Parts:
    """This rank's part of `whole`."""
    built = assemble(case.recipe(), parallel=grid)
    first = assemble(case.recipe(), parallel=make_parallel("single", plugins())).transcoder
    for name, value in cut(first, grid).items():
        assert torch.equal(cut(built.transcoder)[name], value), f"{name} does not start as in one process"
    with torch.no_grad():
        for name, value in cut(whole(case).transcoder, grid).items():
            cut(built.transcoder)[name].copy_(value)
    return built


def cut(transcoder: Any, grid: Grid | None = None, of: str = "data") -> dict[str, torch.Tensor]:
    """Parameters (or their gradients, or their momentum) by file name, cut to a rank's features if a grid is given."""
    out = {}
    for name, (owner, view, axis) in transcoder.views().items():
        value = view(getattr(transcoder.get_parameter(owner), of).detach())
        if grid is not None and axis is not None:
            shard = grid.shard(value.shape[axis])
            value = value.narrow(axis, shard.start, len(shard))
        out[name] = value
    return out


class Whole:
    """A loss that reads the whole reconstruction, as those of other people may."""

    needs_pre = False

    def selection(self, tokens: int, idle_tokens: torch.Tensor) -> None:
        return None

    def __call__(self, forward: Forward) -> dict[str, torch.Tensor]:
        return {"whole": (forward.reconstruction - forward.targets).pow(4).mean()}


def one_pass(case: Case, built: Parts) -> dict[str, torch.Tensor]:
    """A forward and a backward pass: all that is compared with one process."""
    parallel, transcoder = built.context.parallel, built.transcoder
    share = TOKENS // parallel.data_ranks
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    batch = random_batch(TOKENS, 3, 6, TYPES[case.dtype]).rows(rows)
    shard = parallel.shard(FEATURES)
    idle = idle_tokens()[:, shard.start : shard.stop]
    outcome = objective(transcoder, [*built.losses, Whole()], batch, idle, 0.5)
    outcome.total.backward()
    parameters = list(transcoder.parameters())
    parallel.reduce_gradients(parameters)
    out = {f"term.{name}": value for name, value in outcome.terms.items()}
    out["norm"] = gradient_norm(parameters, parallel)
    out["reconstruction"] = outcome.reconstruction
    out["features"] = outcome.features.dense().detach()
    if outcome.features.pairs is not None:
        chosen = torch.zeros(outcome.features.shape, dtype=torch.bool)
        chosen.view(share, -1)[outcome.features.pairs.token, outcome.features.pairs.feature] = True
        out["chosen"] = chosen
    out.update({f"grad.{name}": value.clone() for name, value in cut(transcoder, of="grad").items()})
    return out


def steps(case: Case, built: Parts, count: int = 50) -> dict[str, torch.Tensor]:
    """Weights after some steps of training with clipped gradients."""
    parallel, transcoder = built.context.parallel, built.transcoder
    parameters = list(transcoder.parameters())
    optimizer = make_optimizer(transcoder, case.recipe())
    share = TOKENS // parallel.data_ranks
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    shard = parallel.shard(FEATURES)
    idle = idle_tokens()[:, shard.start : shard.stop]
    for step in range(count):
        batch = random_batch(TOKENS, 3, 6, TYPES[case.dtype], seed=step).rows(rows)
        optimizer.zero_grad(set_to_none=True)
        objective(transcoder, built.losses, batch, idle, step / count).total.backward()
        parallel.reduce_gradients(parameters)
        clip_gradients(parameters, gradient_norm(parameters, parallel), 0.5, optimizer)
        optimizer.step()
    return {name: value.clone() for name, value in cut(transcoder).items()}


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
