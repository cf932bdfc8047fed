"""How fast stored activations reach training: the disk, `local`, `remote` over loopback, and a training step.

    python -m tests.benchmarks.data --json

Writes a data set of random rows (GPT-2 small: 12 layers x 768) to a folder, then takes turns: the disk's own sequential
rate, which is that of reading the same files from end to end past the page cache, in pieces of 16 MiB into the same
memory; `local`; and `remote`, from a `serve` in another process; these, too, read past it. The clock of a source runs
when two groups of rows were handed out, so that all its memory was touched once, up to the end of its second epoch.

What training consumes is measured on the same batches: tokens in a batch over the seconds of a step, without those
spent waiting for data. It falls as the transcoder grows, so how many times that `local` feeds depends on `--features`:
by default 8 times d_model of GPT-2 small, as circuits of it are traced with; a toy of 1,024 features is fed half as
many times. Memory is that of `local` alone, in a process of its own: its peak over what `LocalConfig` states.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clt_datasets.format.chunk import Style, write_chunk
from clt_datasets.format.manifest import Manifest, default_block_rows, read_manifest, write_manifest
from clt_plugins import Batch
from clt_plugins.registry.plugins import load_plugins


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.data", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the data set is written; a temporary one beside the runs")
    parser.add_argument("--gb", type=float, default=2.5, help="size of the data set")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--buffer", type=int, default=8192, help="rows in a buffer of the sources")
    parser.add_argument("--features", type=int, default=6144, help="of the transcoder whose step is timed; 0: none is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", action="store_true", help="also compare `stream` with the bare model")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser


def write_data(folder: Path, options: argparse.Namespace) -> Manifest:
    """A data set of random rows, in chunks of 256 MiB."""
    shape = options.layers, options.d_model
    dtype = getattr(torch, options.dtype)
    row_bytes = 2 * options.layers * options.d_model * dtype.itemsize + 20
    rows = 2**28 // row_bytes
    style = Style(options.dtype, "none", default_block_rows(row_bytes))
    random = torch.Generator().manual_seed(0)
    sides = [torch.randn(rows, *shape, generator=random).to(dtype) for _ in range(2)]
    batch = Batch(*sides, torch.arange(rows), torch.zeros(rows, 2, dtype=torch.int64))
    paths = [folder / f"train_{number:05}.h5" for number in range(max(1, round(options.gb * 1e9 / row_bytes / rows)))]
    write_chunk(paths[0], batch, style, {})
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
    paths.append(folder / "held_out_00000.h5")
    write_chunk(paths[-1], batch.rows(slice(0, 64)), style, {})
    write_manifest(folder, paths, {})
    return read_manifest(folder)


def drop(folder: Path) -> None:
    """Have the system forget what it knows of the files."""
    for path in folder.glob("*.h5"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def disk_rate(folder: Path, room: mmap.mmap) -> float:
    """Bytes per second of reading the rows' files one after the other, past the page cache."""
    count, begun = 0, time.perf_counter()
    for path in sorted(folder.glob("train_*.h5")):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        place = 0
        while got := os.preadv(handle, [room], place):
            place += got
        count += place
        os.close(handle)
    return count / (time.perf_counter() - begun)


def source_rate(source: Any, manifest: Manifest, options: argparse.Namespace) -> float:
    """Bytes per second of the batches of two epochs, but for those of the first two groups."""
    first = 2 * -(-options.buffer // options.batch)
    batches = 2 * manifest.tokens["train"] // options.batch - first
    for _ in range(first):
        source.next()
    begun = time.perf_counter()
    for _ in range(batches):
        source.next()
    return batches * options.batch * manifest.row_bytes / (time.perf_counter() - begun)


def make_source(kind: str, options: argparse.Namespace, **settings: Any) -> Any:
    """A source, by the road a recipe takes."""
    spec = load_plugins().pick("source", kind).spec
    context = SimpleNamespace(
        seed=0,
        device=torch.device("cpu"),
        batch_tokens=options.batch,
        parallel=SimpleNamespace(data_rank=0, data_ranks=1),
    )
    return spec.build(spec.config(buffer_tokens=options.buffer, **settings), context)


def start_server(root: Path) -> tuple[subprocess.Popen[str], str]:
    """A server of its own, and its address."""
    command = [sys.executable, "-m", "clt_plugins", "serve", str(root), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stderr is not None
    line = process.stderr.readline()
    return process, line.split(" at ")[-1].strip()


def training_rate(folder: Path, options: argparse.Namespace) -> float:
    """Tokens per second of training steps, without waiting for data."""
    from clt_plugins import run

    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        recipe = {
            "name": "benchmark",
            "source": {"name": "local", "path": str(folder), "buffer_tokens": options.buffer},
            "transcoder": {"features": options.features},
            # As examples/gpt2.toml in its cheapest steps: at the end of the run, no feature dead.
            "activation": {"name": "batchtopk", "k": 200, "anneal_from": 1.0},
            "losses": ["mse"],
            "loggers": ["jsonl"],
            "train": {"steps": 4, "batch_tokens": options.batch, "log_every": 1, "eval_tokens": 64},
        }
        run(recipe, out=Path(out) / "run")
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    return options.batch / min(line["time/step_s"] for line in lines if "time/step_s" in line)


def source_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """GB that `local` states, takes at the most, and holds when it is closed."""
    command = [sys.executable, "-m", "tests.support.source_memory", str(folder), str(options.batch)]
    printed = subprocess.run([*command, str(options.buffer)], capture_output=True, text=True, check=True).stdout
    found = json.loads(printed)
    return {f"local_memory_{name}_gb": round(size / 1e9, 3) for name, size in found.items()} | {
        "local_memory_over_stated": round(found["peak"] / found["stated"], 3)
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, for a folder in which the data set is written."""
    data = folder / "data"
    data.mkdir()
    manifest = write_data(data, options)
    room = mmap.mmap(-1, 2**24)
    server, url = start_server(folder)
    rates: dict[str, list[float]] = {"disk": [], "local": [], "remote": []}
    try:
        for _ in range(options.rounds):
            drop(data)
            rates["disk"].append(disk_rate(data, room))
            for kind, settings in (("local", {"path": data}), ("remote", {"url": url, "dataset": "data"})):
                drop(data)
                source = make_source(kind, options, **settings)
                rates[kind].append(source_rate(source, manifest, options))
                source.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    local = medians["local"] / manifest.row_bytes
    found = {
        **{f"{name}_gb_per_s": round(rate / 1e9, 3) for name, rate in medians.items()},
        "local_over_disk": _ratio(rates["local"], rates["disk"]),
        "remote_over_local": _ratio(rates["remote"], rates["local"]),
        "local_tokens_per_s": round(local),
        "rounds": {name: [round(rate / 1e9, 3) for rate in each] for name, each in rates.items()},
        "bytes_per_token": manifest.row_bytes,
        "data_gb": round(manifest.tokens["train"] * manifest.row_bytes / 1e9, 2),
        "batch": options.batch,
        "buffer": options.buffer,
        "dtype": options.dtype,
        **source_memory(data, options),
    }
    if options.features:
        training = training_rate(data, options)
        found |= {
            "training_tokens_per_s": round(training),
            "training_features": options.features,
            "local_over_training": round(local / training, 1),
        }
    if options.stream:
        command = [sys.executable, "-m", "tests.benchmarks.stream", "--json"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found["stream_over_bare_model"] = json.loads(printed.splitlines()[-1])["ratio"]
    return found


def _ratio(one: list[float], two: list[float]) -> float:
    """The median over the rounds of the quotient, since slow spells of a machine hit neighbours alike."""
    return round(statistics.median(a / b for a, b in zip(one, two, strict=True)), 3)


def main() -> None:
    options = arguments().parse_args()
    # Not /tmp: there files may lie in memory.
    base = options.folder or Path.cwd()
    with tempfile.TemporaryDirectory(dir=base, prefix=".benchmark-") as folder:
        found = measure(Path(folder), options)
    if options.json:
        print(json.dumps(found))
        return
    print(f"disk       {found['disk_gb_per_s']:6.2f} GB/s")
    print(f"local      {found['local_gb_per_s']:6.2f} GB/s  {found['local_over_disk']:.0%} of the disk (target 80 %)")
    print(f"remote     {found['remote_gb_per_s']:6.2f} GB/s  {found['remote_over_local']:.0%} of local (target 60 %)")
    memory = found["local_memory_peak_gb"], found["local_memory_stated_gb"]
    print(f"memory     {memory[0]:6.2f} GB of local at the most; stated are {memory[1]:.2f} GB")
    if options.features:
        times = found["local_over_training"]
        print(
            f"training   {found['training_tokens_per_s']:6,} tokens/s; local feeds {times:.0f} times that (target 20)"
        )
    if options.stream:
        print(f"stream     {found['stream_over_bare_model']:.0%} of the bare model (target 85 %)")


if __name__ == "__main__":
    main()
