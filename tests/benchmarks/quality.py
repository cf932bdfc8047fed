"""How good a transcoder is at equal cost: this project's defaults beside decode-clt, on real activations.

    python -m tests.benchmarks.quality --json
    python -m tests.benchmarks.quality --model SmolLM2-135M.gguf --peer-python path/to/its/environment/bin/python

Activations of a language model are stored once, and both systems train on them: the same tokens, features, active
features per token and batch, each with the learning rates of a small grid. Printed are, on held-out tokens, the NMSE
(mean over layers, raw units), the features never active, and seconds per step:

- `own`: by learning rate; "default" is what a recipe gets that says nothing about training but its steps and batch.
  The best is the one with the least NMSE among those with at most 2 % of features never active.
- `peer`: by learning rate, in its own trainer's steps (`peers/decode_clt_train.py`); the best by NMSE alone.
- `equal_time`: our defaults for as many steps as the peer's time allows, over the same stored tokens. The ratio of
  seconds per step is the median over rounds, in each a whole training of ours and then 20 steps of the peer.
- `free`: our defaults with other batches, at the same number of tokens.

Without --peer-python only ours are trained. The shipped model needs nothing else; with a SmolLM2-135M file the layers
are 12 to 17 and the text is Python's help topics.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs
import torch

from clt_plugins import run, toml_text

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "peers" / "decode_clt_train.py"
DEAD = 0.02
"""The largest share of features never active with which a learning rate can be the best."""


@attrs.frozen(kw_only=True)
class Setup:
    """What is trained on what."""

    model: dict[str, Any]
    source: dict[str, Any]
    stored_tokens: int
    held_out_tokens: int
    features: int
    k: int
    batch: int
    steps: int
    lrs: list[float]
    peer_lrs: list[float]
    batches: list[int]
    """Tried with "free"."""


def shipped() -> Setup:
    return Setup(
        model={"path": str(ROOT / "examples/models/stdlib-gpt2")},
        source={"name": "stream", "text": "python-stdlib", "context": 256, "buffer_tokens": 32768},
        stored_tokens=614_400,
        held_out_tokens=16_384,
        features=1024,
        k=96,
        batch=1024,
        steps=600,
        lrs=[2e-3, 4e-3, 8e-3],
        peer_lrs=[4e-3, 8e-3, 1.6e-2, 3.2e-2],
        batches=[256],
    )


def smollm2(file: Path, folder: Path) -> Setup:
    """Layers 12 to 17 on Python's help topics, which have 92,160 tokens to train on: trained over about twice."""
    from pydoc_data.topics import topics

    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    return Setup(
        model={"path": str(file.resolve()), "layers": list(range(12, 18))},
        source={"name": "stream", "text": str(text), "context": 256, "held_out": 0.1, "buffer_tokens": 16384},
        stored_tokens=92_160,
        held_out_tokens=10_240,
        features=2048,
        k=100,
        batch=512,
        steps=400,
        lrs=[1e-3, 2e-3, 4e-3],
        peer_lrs=[1e-3, 2e-3, 4e-3],
        batches=[128],
    )


class Benchmark:
    """Trains; keeps the stored activations in a folder."""

    def __init__(self, setup: Setup, folder: Path, options: argparse.Namespace):
        self.setup, self.folder, self.options = setup, folder, options
        self.data = folder / "data"
        self.runs = 0
        torch.set_num_threads(options.threads)

    def store(self) -> None:
        """Store the activations, in float32 and the order of the text."""
        setup = self.setup
        recipe = self.folder / "generate.toml"
        tables = {"name": "quality", "model": setup.model, "source": setup.source, **self._shape(setup.batch, 1)}
        recipe.write_text(toml_text(tables))
        command = [sys.executable, "-m", "clt_plugins", "generate", str(recipe), "--out", str(self.data)]
        command += ["--tokens", str(setup.stored_tokens), "--held-out", str(setup.held_out_tokens)]
        subprocess.run([*command, "--dtype", "float32"], check=True, stdout=sys.stderr)

    def own(self, what: str, steps: int, batch: int, lr: float | None = None) -> dict[str, Any]:
        """A training of ours with its defaults, but for the learning rate if given."""
        self.runs += 1
        out = self.folder / f"run-{self.runs}"
        tables = {
            "name": "quality",
            "source": {"name": "local", "path": str(self.data)},
            "loggers": ["jsonl"],
            **self._shape(batch, steps),
        }
        tables["train"] |= {} if lr is None else {"lr": lr}
        run(tables, out=out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        spent = [line for line in lines if "time/step_s" in line]
        last = next(line for line in reversed(lines) if "eval/nmse" in line)
        found = {
            "nmse": last["eval/nmse"],
            "dead": last["eval/dead_fraction"],
            "l0": last["eval/l0"],
            # Lines come at even intervals, so this is the mean of all steps; the first, in which kernels are compiled
            # (or loaded), is left out.
            "step_s": statistics.fmean(line["time/step_s"] + line["time/data_s"] for line in spent[1:]),
            "lr": max(line["optim/lr"] for line in spent) if lr is None else lr,
            "steps": steps,
        }
        return report(what, found)

    def peer(self, what: str, lr: float, stop_after: int | None = None) -> dict[str, Any]:
        """A training of decode-clt, or its first steps."""
        setup = self.setup
        given = {
            "data": self.data,
            "features": setup.features,
            "batch": setup.batch,
            "k": setup.k,
            "steps": setup.steps,
            "threads": self.options.threads,
            "seed": 0,
            "stop-after": stop_after or setup.steps,
            "lr": lr,
            "loss": self.options.peer_loss,
        }
        command = [self.options.peer_python, str(WORKER), *(f"--{name}={value}" for name, value in given.items())]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return report(what, json.loads(printed.splitlines()[-1]) | {"lr": lr})

    def times_faster(self) -> float:
        """Seconds per step of the peer over ours, the median of rounds."""
        ratios = []
        for _ in range(self.options.rounds):
            mine = self.own("own, timed", self.setup.steps, self.setup.batch)["step_s"]
            ratios.append(self.peer("peer, timed", self.setup.peer_lrs[0], 20)["step_s"] / mine)
        return statistics.median(ratios)

    def _shape(self, batch: int, steps: int) -> dict[str, Any]:
        setup = self.setup
        train = {"steps": steps, "batch_tokens": batch, "log_every": max(1, steps // 20), "checkpoint_every": 10**9}
        train |= {"eval_every": 10**9, "eval_tokens": setup.held_out_tokens}
        return {
            "transcoder": {"features": setup.features},
            "activation": {"name": "batchtopk", "k": setup.k},
            "train": train,
        }


def report(what: str, found: dict[str, Any]) -> dict[str, Any]:
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f"{what:28} {numbers}", file=sys.stderr, flush=True)
    return found


def best(found: dict[str, dict[str, Any]], dead: float) -> dict[str, Any]:
    """The least NMSE among those with few features never active; of all where there is none such."""
    alive = [each for each in found.values() if each["dead"] <= dead]
    return min(alive or found.values(), key=lambda each: each["nmse"])


def measure(bench: Benchmark) -> dict[str, Any]:
    """All figures."""
    setup, options = bench.setup, bench.options
    tokens = setup.steps * setup.batch
    own = {"default": bench.own("own, defaults", setup.steps, setup.batch)}
    for lr in setup.lrs:
        own[f"{lr:g}"] = bench.own(f"own, lr {lr:g}", setup.steps, setup.batch, lr)
    found: dict[str, Any] = {"own": own, "own_best": best(own, DEAD)}
    found["free"] = {str(batch): bench.own(f"own, batch {batch}", tokens // batch, batch) for batch in setup.batches}
    if options.peer_python:
        peer = {f"{lr:g}": bench.peer(f"peer, lr {lr:g}", lr) for lr in setup.peer_lrs}
        found |= {"peer": peer, "peer_best": best(peer, 1.0)}
        times = bench.times_faster()
        longer = bench.own("own, equal time", round(setup.steps * times), setup.batch)
        found |= {"times_faster": times, "equal_time": longer}
        for name in ("own_best", "equal_time"):
            found[f"{name}_over_peer"] = found[name]["nmse"] / found["peer_best"]["nmse"]
        found["default_over_peer"] = own["default"]["nmse"] / found["peer_best"]["nmse"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file of SmolLM2-135M; the shipped model if not given")
    parser.add_argument("--peer-python", help="interpreter that has decode-clt 0.0.1")
    parser.add_argument("--peer-loss", default="own", choices=["own", "by-variance"], help="see its worker")
    parser.add_argument("--folder", type=Path, help="where activations are stored (up to 4 GB), instead of here")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--steps", type=int, help="shorter trainings, to try the benchmark itself")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".benchmark-") as work:
        folder = Path(work)
        setup = smollm2(options.model, folder) if options.model else shipped()
        if options.steps:
            setup = attrs.evolve(setup, steps=options.steps, stored_tokens=options.steps * setup.batch)
        bench = Benchmark(setup, folder, options)
        bench.store()
        found = {"setup": attrs.asdict(setup), "threads": options.threads, **measure(bench)}
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
