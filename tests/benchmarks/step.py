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
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from clt_plugins.training.host.memory import kept_memory
from tests.benchmarks.own_step import Own
from tests.benchmarks.timing import machine, neighbours, peak_rss_gb, read_bandwidth, threads
from tests.benchmarks.workers import compare

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


def serve(step: Callable[[], object]) -> None:
    """Be a worker."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print("seconds", _time(step), flush=True)
    print("peak_rss_gb", peak_rss_gb(), flush=True)


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
