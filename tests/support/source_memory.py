"""What a `local` source takes of memory, in a process of its own in which nothing else is.

    python -m tests.support.source_memory FOLDER BATCH_TOKENS BUFFER_TOKENS

Prints, in bytes: `stated`, what `LocalConfig` says it takes; `peak`, what it took at the most while two epochs were
handed out, each batch held until the next one came; `left`, what was still there of that when it was closed. The
garbage collector is off, so that memory only it would find is counted.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clt_datasets import LocalConfig, build_local


def status(name: str) -> int:
    """VmRSS (bytes now) or VmHWM (at the most) of this process; unlike `getrusage`, the latter knows no parents."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def stated(store: Any, batch_tokens: int, buffer_tokens: int) -> int:
    """See `LocalConfig`."""
    row = 2 * store.n_layers * store.d_model * store.dtype.itemsize
    return (2 * buffer_tokens + 4 * batch_tokens) * row + 64 * 2**20


def main(folder: Path, batch_tokens: int, buffer_tokens: int) -> None:
    gc.disable()
    context = SimpleNamespace(
        seed=0,
        device=torch.device("cpu"),
        batch_tokens=batch_tokens,
        parallel=SimpleNamespace(data_rank=0, data_ranks=1),
    )
    before = status("VmRSS")
    source = build_local(LocalConfig(path=folder, buffer_tokens=buffer_tokens), context)  # type: ignore[arg-type]
    bound = stated(source.store, batch_tokens, buffer_tokens)
    for _ in range(2 * sum(source.store.chunks["train"]) // batch_tokens):
        batch = source.next()
    peak = status("VmHWM") - before
    del batch
    source.close()
    print(json.dumps({"stated": bound, "peak": peak, "left": status("VmRSS") - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
