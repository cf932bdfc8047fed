"""Seconds per training step, piece by piece, against a roofline and against other systems.

    python -m tests.benchmarks.step --layers 12 --d-model 768 --features 3072 --batch 512 --k 200 --json
    python -m tests.benchmarks.step ... --against decode-clt --against-python path/to/its/environment/bin/python
    python -m tests.benchmarks.step ... --whole     # with a k that falls, AuxK, normalisation and data, as in runs
    python -m tests.benchmarks.step ... --noisy     # beside a busy process for each core; with --whole as runs do

Every system runs in a process of its own and takes its steps in turn with the others. The roofline is the encoder's
matrix product, as measured here; one read of the active rows for each of the three sparse passes at the read bandwidth
measured here; and one pass of the fused optimizer, as measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clt_plugins.model.products.matrix import affine
from clt_plugins.training.host.memory import kept_memory
from tests.benchmarks.timing import alternate, machine, median_seconds, neighbours, peak_rss_gb, read_bandwidth, threads

PEERS = Path(__file__).parent / "peers"

STEPS = 5
"""Steps whose parts are timed."""
SETTLING = 40
"""Steps after which a run beside busy processes has found how many threads to use."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, default=200, help="active features per token over all layers")
    parser.add_argument("--tying", default="untied")
    parser.add_argument("--activation", default="batchtopk")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--path", default="sparse", choices=["sparse", "dense"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the encoder's matrix product")
    parser.add_argument("--threads", type=int, default=threads(), help="OMP_NUM_THREADS, else one for each core")
    parser.add_argument("--whole", action="store_true", help="with a k that falls, AuxK, normalisation and data")
    parser.add_argument("--progress", type=float, default=0.4, help="with --whole: the share of the run that is done")
    parser.add_argument("--dead", type=float, default=0.05, help="with --whole: the share of features that are dead")
    parser.add_argument("--noisy", action="store_true", help="beside a busy process for each core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", action="append", default=[], help="dense, decode-clt, llamascopium")
    parser.add_argument("--against-python", default=sys.executable, help="interpreter that has the other system")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


class Own:
    """This project's training step on random activations."""

    def __init__(self, options: argparse.Namespace):
        from clt_plugins.data.batch import Batch
        from clt_plugins.model.assemble import assemble
        from clt_plugins.model.sparse import reuse_gradients
        from clt_plugins.recipe.read import read_recipe
        from clt_plugins.registry.plugins import load_plugins
        from clt_plugins.training.host.threads import Threads
        from clt_plugins.training.optimizers.make import is_matrix, make_optimizer

        torch.set_num_threads(options.threads)
        plugins = load_plugins()
        activation: dict[str, Any] = {"name": options.activation}
        if "topk" in options.activation:
            activation |= {"k": options.k} if options.whole else {"k": options.k, "anneal_from": 1}
        losses = [{"name": "mse"}, {"name": "auxk"}] if options.whole else [{"name": "mse"}]
        normalisation = "mean_std" if options.whole else "none"
        tables = {
            "name": "benchmark",
            "source": {"name": "synthetic", "layers": options.layers, "d_model": options.d_model, "features": 64},
            "transcoder": {"features": options.features, "path": options.path},
            "normalisation": normalisation,
            "activation": activation,
            "losses": losses,
            "tying": {"name": options.tying},
            "kernels": {"name": options.kernels},
            "train": {"steps": 1000, "batch_tokens": options.batch, "precision": options.dtype, "lr": 1e-4},
        }
        recipe = read_recipe(tables, plugins=plugins)
        self.parts = assemble(recipe)
        self.transcoder = self.parts.transcoder
        self.optimizer = make_optimizer(self.transcoder, recipe)
        if options.path == "sparse":
            reuse_gradients(p for p in self.transcoder.parameters() if is_matrix(p, self.transcoder.d_model))
        generator = torch.Generator().manual_seed(0)
        shape = options.batch, options.layers, options.d_model
        self.batch = Batch(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        self.idle = torch.zeros(options.layers, options.features, dtype=torch.int64)
        self.whole = options.whole
        self.threads = Threads()
        if self.whole:
            # Rows of a block in random order, as sources give them; a share of the features stays dead.
            self.block = [torch.cat([x] * 4) for x in (self.batch.inputs, self.batch.targets)]
            self.order = torch.randperm(4 * options.batch, generator=generator)[: options.batch]
            self.dead = torch.rand(self.idle.shape, generator=generator) < options.dead
            self.limit = recipe.train.dead_after_tokens
            self.transcoder.activation.schedule(options.progress)

    def step(self) -> Any:
        from clt_plugins.data.batch import Batch
        from clt_plugins.training.objective import objective

        if self.whole:
            self.threads.begin()
            self.batch = Batch(*(rows.index_select(0, self.order) for rows in self.block))
            self.idle = torch.where(self.dead, self.limit, self.idle)
        self.optimizer.zero_grad(set_to_none=True)
        outcome = objective(self.transcoder, self.parts.losses, self.batch, self.idle, 0.5)
        outcome.total.backward()
        self.optimizer.step()
        if self.whole:
            active = outcome.features.counts() > 0
            self.idle = torch.where(active, 0, self.idle + self.batch.tokens)
            self.threads.end()
        return outcome

    def pieces(self) -> tuple[dict[str, float], Any]:
        """The seconds of each part of a step (means of a few), by timers around them; and the last step's outcome.

        `gradients` are those of values and rows together, where the kernels compute both at once.
        """
        kernels = self.parts.context.kernels
        spent: dict[str, list[float]] = {}
        inside: list[str] = []

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                inside.append(name)
                result = function(*args, **kwargs)
                inside.pop()
                if inside in ([], ["step"]):  # what a part calls is counted with it
                    spent.setdefault(name, []).append(time.perf_counter() - start)
                return result

            return call

        # Methods of the instance come before those of its class; deleting them brings those back.
        products = [name for name in ("decode", "grad_values", "grad_rows", "gradients") if hasattr(kernels, name)]
        select, step = kernels.select, self.optimizer.step

        def timed_select(*args: Any, **kwargs: Any) -> Any:
            one = timed("selection", select)(*args, **kwargs)
            one.see, one.finish = timed("selection", one.see), timed("selection", one.finish)
            return one

        try:
            for name in products:
                setattr(kernels, name, timed(name, getattr(kernels, name)))
            kernels.select = timed_select
            self.optimizer.step = timed("optimizer", step)  # type: ignore[method-assign]
            for _ in range(STEPS):
                outcome = timed("step", self.step)()
        finally:
            for name in (*products, "select"):
                delattr(kernels, name)
            self.optimizer.step = step  # type: ignore[method-assign]
        out = {name: sum(seconds) / STEPS for name, seconds in spent.items()}
        out["encoder_product"] = self.product()
        out["rest"] = out["step"] - sum(value for name, value in out.items() if name != "step")
        return out, outcome

    def product(self) -> float:
        """The encoder's matrix product alone, without selection."""
        model = self.transcoder
        x, weight, bias = self.batch.inputs, model.W_enc.detach(), model.b_enc.detach()

        def run() -> None:
            for layer in range(weight.shape[0]):
                affine(x[:, layer], weight[layer], bias[layer], model.product)

        return median_seconds(run)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """What this project's step costs."""
    with kept_memory(torch.device("cpu")):
        return _report(options)


def _report(options: argparse.Namespace) -> dict[str, Any]:
    own = Own(options)
    for _ in range(SETTLING if options.noisy and options.whole else 2):
        own.step()
    seconds = statistics.median(_time(own.step) for _ in range(options.rounds))
    peak = peak_rss_gb()
    pieces, outcome = own.pieces()
    pairs, layout = outcome.features.pairs, getattr(own.transcoder.tying, "layout", None)
    bandwidth = read_bandwidth()
    rows_bytes = 0
    if pairs is not None:
        targets = torch.tensor(layout.count) if layout is not None else torch.ones(options.layers, dtype=torch.int64)
        rows_bytes = int(targets[pairs.layer].sum()) * options.d_model * own.parts.context.dtype.itemsize
    roofline = pieces["encoder_product"] + 3 * rows_bytes / bandwidth + pieces["optimizer"]
    weights = sum(p.numel() * p.element_size() for p in own.transcoder.parameters())
    return {
        "machine": machine(),
        "tokens_per_s": options.batch / seconds,
        "seconds": seconds,
        "peak_rss_gb": peak,
        "threads": torch.get_num_threads(),
        "pieces": pieces,
        "roofline": {
            "seconds": roofline,
            "read_gb_per_s": bandwidth / 1e9,
            "active_rows_gb": rows_bytes / 1e9,
        },
        "over_roofline": seconds / roofline,
        "memory_floor_gb": 4 * weights / 1e9,
        "peak_over_allowed": peak / ((1.3 * 4 * weights + 2 * options.batch * options.features * 4) / 1e9),
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("json", "worker", "against_python")
        },
    }


def _time(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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


def serve(step: Callable[[], object]) -> None:
    """Be a worker."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print("seconds", _time(step), flush=True)
    print("peak_rss_gb", peak_rss_gb(), flush=True)


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


def main() -> None:
    options = arguments().parse_args()
    if options.worker:
        with kept_memory(torch.device("cpu")):
            serve(Own(options).step)
        return
    with neighbours(len(os.sched_getaffinity(0)) if options.noisy else 0):
        # Comparing first: a peer then has the machine's memory to itself and to one process of ours.
        against = compare(options) if options.against else None
        result = report(options)
    if against is not None:
        result["against"] = against
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
