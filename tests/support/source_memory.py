"""Memory of a `local` source, in a process of its own in which nothing else is.

    python -m tests.support.source_memory FOLDER BATCH_TOKENS BUFFER_TOKENS

Prints, in bytes: `stated`, the limit that `LocalConfig` states; `peak`, the most that was used while the source yielded
two epochs, each batch held until the next one came; `left`, what was still used when the source was closed. The garbage
collector is off, so that memory that only it would free is counted.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from clt_datasets import LocalConfig, build_local
from tests.support.stored_data import make_context


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
    context = make_context(batch_tokens=batch_tokens, seed=0)
    before = status("VmRSS")
    source = build_local(LocalConfig(path=folder, buffer_tokens=buffer_tokens), context)
    bound = stated(source.store, batch_tokens, buffer_tokens)
    for _ in range(2 * sum(source.store.chunks["train"]) // batch_tokens):
        batch = source.next()
    peak = status("VmHWM") - before
    del batch
    source.close()
    print(json.dumps({"stated": bound, "peak": peak, "left": status("VmRSS") - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
