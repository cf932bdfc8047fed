"""Seconds of selection and of each sparse product by each kernels plugin, products against one read of their rows.

    python -m tests.benchmarks.kernels --layers 12 --d-model 768 --features 3072 --batch 512 --k 200 --json

Two rooflines, at the read bandwidth measured here: `each_row_once` reads (for grad_rows, writes) every row that is
active at any token once; `row_per_pair` reads each pair's rows anew, as a product does that keeps no row in a cache.
Pairs are random and even over features. Kernels take turns, medians count. `processor_seconds` are those of all
threads. `select_batch` and `select_token` choose k per token among numbers whose spread differs between features and
grows from layer to layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any, Literal

import torch

from clt_plugins import Layout, Pairs, Top
from clt_plugins.contract.model.kernels import Kernels
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import load_plugins
from tests.benchmarks.timing import alternate, read_bandwidth

LAYOUTS = {
    "own_layer": Layout.own_layer,
    "untied": Layout.untied,
    "per_source": Layout.per_source,
    "per_target": Layout.per_target,
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--features", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, default=200, help="active features per token over all layers")
    parser.add_argument("--layout", default="untied", choices=LAYOUTS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"], help="of the weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", nargs="+", default=["numba", "torch"])
    parser.add_argument("--only", choices=["products", "select"])
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    return parser


def random_pairs(options: argparse.Namespace) -> Pairs:
    """Exactly k · B different pairs."""
    room = options.batch * options.layers * options.features
    wanted = options.batch * options.k
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(room, (wanted * 2,), generator=generator).unique()
    flat = flat[torch.randperm(len(flat), generator=generator)[:wanted]].sort().values.to(options.device)
    per_token = options.layers * options.features
    return Pairs(flat // per_token, flat % per_token, options.batch, options.layers, options.features)


def selections(options: argparse.Namespace, kernels: Kernels) -> dict[str, Any]:
    """A batch's selection, per batch and per token."""
    random = torch.Generator().manual_seed(0)
    spread = torch.rand(options.layers, 1, options.features, generator=random) + 0.5
    blocks = torch.randn(options.layers, options.batch, options.features, generator=random) * spread
    blocks = (blocks * torch.linspace(0.7, 1.4, options.layers)[:, None, None] - 0.5).to(options.device)

    def of(per: Literal["token", "batch"]) -> Any:
        def select() -> None:
            top = Top(options.k, options.batch, options.layers, options.features, per=per, kernels=kernels)
            for layer, block in enumerate(blocks):
                top.see(layer, block)
            top.finish()

        return select

    return {"select_batch": of("batch"), "select_token": of("token")}


class Timed:
    """The three products of one kernels plugin on one problem."""

    def __init__(self, kernels: Kernels, layout: Layout, pairs: Pairs, weight: torch.Tensor):
        self.kernels, self.layout, self.pairs, self.weight = kernels, layout, pairs, weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        place = {"dtype": wide, "device": weight.device}
        self.values = torch.rand(len(pairs.token), **place)
        self.dense = torch.rand(pairs.tokens, pairs.n_layers, weight.shape[1], **place)
        self.out = torch.empty_like(self.dense), torch.empty_like(self.values), torch.empty_like(weight)

    def products(self) -> dict[str, Any]:
        decoded, grad_values, grad_rows = self.out
        values, layout, weight, dense = self.values, self.layout, self.weight, self.dense

        # Grouping the pairs by feature is paid once per step, and cached in the pairs: start with new ones each time.
        def fresh() -> Pairs:
            old = self.pairs
            return Pairs(old.token, old.feature, old.tokens, old.n_layers, old.n_features)

        def everything() -> None:
            pairs = fresh()
            self.kernels.decode(values, pairs, layout, weight, decoded)
            self.kernels.grad_values(dense, pairs, layout, weight, grad_values)
            self.kernels.grad_rows(values, pairs, layout, dense, grad_rows, overwrite=True)

        same = fresh()
        return {
            "decode": lambda: self.kernels.decode(values, same, layout, weight, decoded),
            "grad_values": lambda: self.kernels.grad_values(dense, same, layout, weight, grad_values),
            "grad_rows": lambda: self.kernels.grad_rows(values, same, layout, dense, grad_rows, overwrite=True),
            "all_with_grouping": everything,
        }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    device, plugins = torch.device(options.device), load_plugins()
    layout, pairs = LAYOUTS[options.layout](options.layers, options.features), random_pairs(options)
    weight = torch.rand(layout.rows, options.d_model, device=device).to(getattr(torch, options.dtype))
    calls, first = {}, {}
    for name in options.kernels:
        timed = Timed(make_kernels(name, device, plugins), layout, pairs, weight)
        functions = timed.products() if options.only != "select" else {}
        functions |= selections(options, timed.kernels) if options.only != "products" else {}
        for product, function in functions.items():
            calls[name, product] = _seconds(function, device)
            first[name, product] = calls[name, product]()  # compiles
    labels = {f"{name} {product}": call for (name, product), call in calls.items()}
    seconds = alternate(labels, options.rounds)
    counts = torch.tensor(layout.count, device=device)
    row_bytes = options.d_model * weight.element_size()
    used = pairs.feature.unique() // layout.n_features
    bandwidth = read_bandwidth()
    once, per_pair = (int(counts[layer].sum()) * row_bytes / bandwidth for layer in (used, pairs.layer))
    return {
        "roofline": {"read_gb_per_s": bandwidth / 1e9, "each_row_once": once, "row_per_pair": per_pair},
        "seconds": {
            name: {
                product: statistics.median(seconds[f"{name} {product}"]) for other, product in calls if other == name
            }
            for name in options.kernels
        },
        "over_row_per_pair": {
            name: {
                product: statistics.median(seconds[f"{name} {product}"]) / (per_pair * (3 if "all" in product else 1))
                for other, product in calls
                if other == name and not product.startswith("select")
            }
            for name in options.kernels
        },
        "processor_seconds": {
            name: {
                product: _processor(call, options.rounds) for (other, product), call in calls.items() if other == name
            }
            for name in options.kernels
        },
        "first_call": {f"{name} {product}": seconds for (name, product), seconds in first.items()},
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
    }


def _processor(call: Any, rounds: int) -> float:
    """Median processor time of all threads."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _seconds(function: Any, device: torch.device) -> Any:
    def call() -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return call


def main() -> None:
    options = arguments().parse_args()
    print(json.dumps(measure(options), indent=None if options.json else 2))


if __name__ == "__main__":
    main()
