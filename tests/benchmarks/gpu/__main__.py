"""One command for a machine with a GPU: is it right, how fast is it, where does the time go.

    python -m tests.benchmarks.gpu --json figures.json

It needs no network, no language model and no texts: torch, triton and this project's small dependencies. What a machine
lacks can travel as wheels (`pip download` on another machine; see the guide "GPU"). It ends within 8 minutes: a section
that would begin later than that is left out, and named. Nothing here was run on a device yet.

Sections, in this order: `ceilings` of this GPU; `kernels` and `selection` against their definitions; `steps` beside the
CPU's, two runs bit for bit, and without a wait of the host; `shapes`: pieces of a step by CUDA events, beside the
model's times, and the peak of memory beside `plan`'s; `peers` that are installed; `quickstart`: the shipped model
trained, where nnsight is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.benchmarks.gpu import pieces, right
from tests.benchmarks.gpu.ceilings import ceilings
from tests.benchmarks.gpu.peers import peers
from tests.benchmarks.gpu.table import table

MINUTES = 8
QUICKSTART = Path(__file__).resolve().parents[3] / "examples" / "quickstart.toml"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help='write the figures into FILE; "-" prints them')
    parser.add_argument("--device", default="cuda", help='"cpu" tries the benchmark itself, at small sizes')
    parser.add_argument("--kernels", default="auto", help="the kernels under test")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="may be repeated")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    return parser


def sections(device: torch.device, plugins: Plugins, name: str) -> dict[str, Callable[[], Any]]:
    """What is measured, in the order of use."""
    small = device.type == "cpu"
    shapes = pieces.tiny() if small else pieces.shapes()
    peer_shape = {"layers": 12, "d-model": 768, "features": 3072, "batch": 2048, "k": 200}
    if small:
        peer_shape = {"layers": 2, "d-model": 16, "features": 64, "batch": 32, "k": 8}
    return {
        "ceilings": lambda: ceilings(device, small=small),
        "kernels": lambda: right.kernels(device, plugins, name),
        "selection": lambda: right.selection(device, plugins, name, small=small),
        "steps": lambda: right.steps(device, plugins),
        **{f"shapes: {key}": partial(pieces.measure, shape, plugins, device) for key, shape in shapes.items()},
        "peers": lambda: peers(device, peer_shape),
        "quickstart": lambda: quickstart(device),
    }


def quickstart(device: torch.device) -> Any:
    """The held-out NMSE and the seconds of examples/quickstart.toml, where its language model can be run."""
    missing = [name for name in ("nnsight", "transformers", "datasets") if find_spec(name) is None]
    if missing:
        return f"not run: {', '.join(missing)} not installed"
    from clt_plugins import run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        changes = {"steps": 20, "eval_tokens": 1024} if device.type == "cpu" else {}
        run(_recipe(device, changes), out=out)
        last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    nmse = [line["eval/nmse"] for line in last if "eval/nmse" in line]
    return {"nmse": nmse[-1], "seconds": time.perf_counter() - started}


def _recipe(device: torch.device, train: dict[str, Any]) -> dict[str, Any]:
    import tomllib

    tables = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))
    tables["model"]["path"] = str(QUICKSTART.parent / tables["model"]["path"])
    tables["transcoder"]["device"] = str(device)
    tables["train"].update(train)
    tables["loggers"] = [{"name": "jsonl"}]
    return tables


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    out = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    out["triton"] = __import__("triton").__version__ if find_spec("triton") else "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        out.update(gpu=properties.name, memory_bytes=properties.total_memory, cuda=str(torch.version.cuda))
    return out


def main() -> None:
    options = arguments().parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use here: `--device cpu` tries the benchmark itself, at small sizes")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    plugins = load_plugins()
    figures: dict[str, Any] = {"machine": machine(device)}
    started = time.perf_counter()
    for name, section in sections(device, plugins, options.kernels).items():
        if options.only and not any(name.startswith(word) for word in options.only):
            continue
        begun = time.perf_counter()
        if begun - started > 60 * options.minutes:
            figures[name] = f"left out: {options.minutes:g} minutes were over"
            continue
        try:
            figures[name] = section()
        except Exception as error:  # one section that fails must not lose the others' figures
            traceback.print_exc()
            figures[name] = f"failed: {type(error).__name__}: {error}"[:500]
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        figures.setdefault("seconds", {})[name] = round(time.perf_counter() - begun, 1)
    if options.json == "-":
        print(json.dumps(figures))
        return
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(figures))
    if any(isinstance(value, str) and value.startswith("failed") for value in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
