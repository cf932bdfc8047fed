"""A training step on several ranks against one: seconds, memory, bytes sent.

    python -m tests.benchmarks.parallel --ranks 2 --json

The same model and the same batch, on one rank and on `--ranks`, each rank with one thread. Both take their steps in
turn (A B A B ...), so that a slow spell of the machine hits both; the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from clt_plugins.testing.processes.ports import free_port
from tests.benchmarks.timing import peak_rss_gb


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parallel", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--features", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, default=200, help="active features per token over all layers")
    parser.add_argument("--activation", default="batchtopk", choices=["topk", "batchtopk"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


class Step:
    """One rank's training step on random activations."""

    def __init__(self, options: argparse.Namespace):
        from clt_plugins.data.batch import Batch
        from clt_plugins.model.assemble import assemble
        from clt_plugins.model.sparse import reuse_gradients
        from clt_plugins.recipe.read import read_recipe
        from clt_plugins.registry.plugins import load_plugins
        from clt_plugins.training.optimizers.make import is_matrix, make_optimizer

        torch.set_num_threads(1)
        plugins = load_plugins()
        tables = {
            "name": "benchmark",
            "source": {"name": "synthetic", "layers": options.layers, "d_model": options.d_model, "features": 64},
            "transcoder": {"features": options.features, "device": "cpu"},
            "normalisation": "none",
            "activation": {"name": options.activation, "k": options.k},
            "parallel": {"name": "tensor"} if int(os.environ["WORLD_SIZE"]) > 1 else {"name": "single"},
            "train": {"steps": 1000, "batch_tokens": options.batch, "lr": 1e-4},
        }
        recipe = read_recipe(tables, plugins=plugins)
        self.parts = assemble(recipe)
        self.parallel = self.parts.context.parallel
        self.transcoder = self.parts.transcoder
        self.parameters = list(self.transcoder.parameters())
        self.optimizer = make_optimizer(self.transcoder, recipe)
        reuse_gradients(p for p in self.parameters if is_matrix(p, options.d_model))
        generator = torch.Generator().manual_seed(0)
        shape = options.batch, options.layers, options.d_model
        self.batch = Batch(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        self.reading: Any = None
        self.idle = torch.zeros(self.transcoder.shape, dtype=torch.int64)

    def __call__(self) -> float:
        """Seconds of one step."""
        from clt_plugins.distributed.reading import Reading
        from clt_plugins.training.objective import objective

        class Ready:
            next = staticmethod(lambda: self.batch)

        if self.reading is None:
            self.reading = Reading(Ready(), self.parallel, torch.device("cpu"))  # type: ignore[arg-type]
        start = time.perf_counter()
        batch = self.reading.next()
        self.optimizer.zero_grad(set_to_none=True)
        outcome = objective(self.transcoder, self.parts.losses, batch, self.idle, 0.5)
        outcome.total.backward()
        self.parallel.reduce_gradients(self.parameters)
        self.reading.check()
        self.optimizer.step()
        return time.perf_counter() - start


def serve(step: Step) -> None:
    """A line in, a step, a line out; at the end what it took."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        before, cpu = step.parallel.sent(), time.process_time()
        seconds = step()
        sent = {what: count - before.get(what, 0) for what, count in step.parallel.sent().items()}
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "sent": sent}), flush=True)
    print(json.dumps({"peak_rss_gb": peak_rss_gb()}), flush=True)
    step.parallel.close()


class System:
    """Some ranks that take a step when told."""

    def __init__(self, ranks: int, flags: list[str]):
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.benchmarks.parallel", "--worker", *flags]
        self.workers = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def _tell(self, word: str) -> list[dict[str, Any]]:
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write(word + "\n")
            worker.stdin.flush()
        return [json.loads(worker.stdout.readline()) for worker in self.workers]  # type: ignore[union-attr]

    def step(self) -> dict[str, Any]:
        """What the slowest rank took."""
        return max(self._tell("step"), key=lambda each: each["seconds"])

    def end(self) -> list[float]:
        """The peak memory of each rank, GB."""
        peaks = [each["peak_rss_gb"] for each in self._tell("end")]
        for worker in self.workers:
            worker.wait()
        return peaks


def main() -> None:
    options = arguments().parse_args()
    if options.worker:
        serve(Step(options))
        return
    systems = {"one": System(1, sys.argv[1:]), "many": System(options.ranks, sys.argv[1:])}
    for system in systems.values():
        system.step()  # compiles
    rounds = [{name: system.step() for name, system in systems.items()} for _ in range(options.rounds)]
    seconds = {name: statistics.median(each[name]["seconds"] for each in rounds) for name in systems}
    peaks = {name: system.end() for name, system in systems.items()}
    sent = rounds[-1]["many"]["sent"]
    reduction = 2 * options.batch * options.layers * options.d_model * 4
    out = {
        "ranks": options.ranks,
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
        "all_seconds": {name: [round(each[name]["seconds"], 3) for each in rounds] for name in systems},
        "time_ratio": statistics.median(each["many"]["seconds"] / each["one"]["seconds"] for each in rounds),
        # Of a rank's own core: not slowed by whatever else the machine does.
        "cpu_time_ratio": statistics.median(each["many"]["cpu"] / each["one"]["cpu"] for each in rounds),
        "peak_rss_gb": peaks,
        "memory_ratio": max(peaks["many"]) / peaks["one"][0],
        "bytes_per_step_and_rank": sent,
        "share_of_2BLD_plus_selection": sum(sent.values()) / (reduction + sent.get("selection", 0)),
        "gathering_features_would_be": options.batch * options.layers * options.features * 4,
    }
    print(json.dumps(out, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
