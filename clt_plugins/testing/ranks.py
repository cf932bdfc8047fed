"""Tensor parallel = single: the parent's side. Ranks are processes that stay for the next case.

The choice `tensor` of `[parallel]` joins them, as `torchrun` would have it: by RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. What a rank has is compared with its slice of what one process has.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from clt_plugins.files.folders import read_tensors
from clt_plugins.testing.bench import Bench, step
from clt_plugins.testing.report import complain, expect, same
from clt_plugins.testing.transcoders import ROUNDING

RANKS = (2, 3)
CHOICE = "tensor"
TIMEOUT_S = 240
"""Of one job; ranks that take longer wait for each other."""


class Pool:
    """Processes for the ranks of one world size; they take jobs as lines of JSON."""

    def __init__(self, world: int):
        self.world = world
        path = os.pathsep.join(each for each in sys.path if each)
        environment = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "clt_plugins.testing.rank"],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def run(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank answers.

        Raises:
            RuntimeError: a rank died, or they wait for each other; the pool is closed then.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        line = json.dumps({**job, "port": port, "path": sys.path}) + "\n"
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < self.world:
                ready = selector.select(TIMEOUT_S)
                if not ready:
                    self.close()
                    waiting = sorted(set(range(self.world)) - answers.keys())
                    raise RuntimeError(f"ranks {waiting} of {self.world} did not answer in {TIMEOUT_S} s")
                for key, _ in ready:
                    text = key.fileobj.readline()  # type: ignore[union-attr]
                    if not text:
                        self.close()
                        raise RuntimeError(f"rank {key.data} of {self.world} died")
                    answers[key.data] = json.loads(text)
                    selector.unregister(key.fileobj)
                    if "error" in answers[key.data]:
                        # The others may wait for this one for ever: they are of no use any more.
                        self.close()
                        return [answers[key.data]]
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        _pools.pop(self.world, None)
        for process in self.processes:
            process.kill()
            process.communicate()


_pools: dict[int, Pool] = {}


@atexit.register
def _close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of copies, so that views of one tensor do not hinder it."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, path)


def on_ranks(bench: Bench, world: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a job of `clt_plugins.testing.rank` on so many ranks.

    Raises:
        Nonconformance: with the error of the first rank that failed.
    """
    if world not in _pools:
        _pools[world] = Pool(world)
    answers = _pools[world].run({"module": bench.module, **job})
    for answer in answers:
        if "error" in answer:
            complain(f"the step to run on {world} ranks", answer["error"], answer["place"])
    return answers


def tensor_parallel(bench: Bench) -> None:
    """On 2 and 3 ranks that share the features, everything is as on one: first values, terms, features, gradients.

    Skipped where no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    wanted: dict[str, Any] = {"transcoder": {"dtype": "float64", "path": "sparse"}}
    parts = bench.parts(stirred=False, **wanted)
    fresh = {f"first/{name}": value.clone() for name, value in _own(parts).items()}
    stirred = bench.parts(**wanted)
    write_tensors(bench.folder / "weights.safetensors", _own(stirred))
    single = results(stirred, bench)
    recipe = bench.recipe_data(parallel={"name": CHOICE}, **wanted)
    for world in RANKS:
        job = {"do": "step", "recipe": recipe, "slot": bench.slot, "folder": str(bench.folder)}
        answers = on_ranks(bench, world, job)
        ranks = [read_tensors(bench.folder / f"rank{rank}.safetensors") for rank in range(world)]
        _compare(fresh | single, ranks, answers, world)


def _own(parts: Any) -> dict[str, Tensor]:
    """The transcoder's tensors without its statistics."""
    return {name: x for name, x in parts.transcoder.tensors().items() if not name.startswith("normaliser.")}


def results(parts: Any, bench: Any) -> dict[str, Tensor]:
    """What is compared after a step: `term/…`, `grad/…` cut as files are, `features` and `reconstruction`."""
    outcome = step(parts, bench.batch(torch.float64))
    parameters = dict(parts.transcoder.named_parameters())
    parts.context.parallel.reduce_gradients(list(parameters.values()))
    found = {f"term/{name}": value for name, value in outcome.terms.items()}
    found |= {"features": outcome.features.dense().detach(), "reconstruction": outcome.reconstruction}
    for name, (owner, view, _) in parts.transcoder.views().items():
        grad = parameters[owner].grad
        found[f"grad/{name}"] = view(torch.zeros_like(parameters[owner]) if grad is None else grad)
    return found


# In the order in which one follows from the other: the first that differs is where to look.
LOOK = {
    "first": "`__init__`: draw with `clt_plugins.uniform`, which cuts what one process draws; nothing else random",
    "features": "`selection`: the k best of this rank are not the k best of all; give `Top` its `parallel`",
    "reconstruction": "`decode` and `affine`: a bias must not be in `decode`, which is summed over ranks",
    "term": "the loss: wrap what it adds up over features in `forward.sum_features`; do not take means over features",
    "grad": "`feature_axis` of the parameter (`clt_plugins.parameter`), and sums over features that miss other ranks",
}


def _compare(
    single: dict[str, Tensor], ranks: list[dict[str, Tensor]], answers: list[dict[str, Any]], world: int
) -> None:
    for name in sorted(single, key=lambda name: list(LOOK).index(name.split("/")[0])):
        kind, _, inner = name.partition("/")
        axis = 2 if kind == "features" else answers[0]["axes"].get(inner)
        tolerance = 0.0 if kind == "first" else ROUNDING
        for rank, (found, answer) in enumerate(zip(ranks, answers, strict=True)):
            what = f"{name.replace('/', ' of ')} on rank {rank} of {world} as in one process"
            expect(name in found, what, "rank has none", LOOK[kind])
            wanted = single[name]
            if axis is not None:
                start, stop = answer["shard"]
                wanted = wanted.narrow(axis, start, stop - start)
            same(found[name], wanted, what, LOOK[kind], tolerance)


def weights_of(folder: Path, shard: range, axes: dict[str, int | None]) -> dict[str, Tensor]:
    """A rank's slice of the weights that the parent wrote."""
    found = read_tensors(folder / "weights.safetensors")
    return {
        name: x if axes[name] is None else x.narrow(axes[name], shard.start, len(shard))  # type: ignore[arg-type]
        for name, x in found.items()
    }
