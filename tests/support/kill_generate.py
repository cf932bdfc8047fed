"""Kills generations at random moments and resumes them.

    python -m tests.support.kill_generate FOLDER KILLS [MODEL TEXT]

A process of its own, which imports everything once, runs nothing in threads, and forks a generation at a time.
Prints how many chunks there were at each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import clt_datasets.make.generate
import clt_stream.source  # noqa: F401 - so that forked processes need not import it
import clt_synthetic.source  # noqa: F401
from clt_plugins.contract.recipe import Recipe
from clt_plugins.recipe.read import read_recipe
from tests.support.helpers import plugins, tables


def make_recipe(model: str | None, text: str | None) -> Recipe:
    """Some tenths of a second of work, in many chunks."""
    if model is None:
        source = {"name": "synthetic", "layers": 4, "d_model": 128, "features": 64, "noise": 0.1}
        train = {"batch_tokens": 64, "steps": 30, "eval_tokens": 200}
        return read_recipe(tables(source=source, train=train), plugins=plugins())
    source = {"name": "stream", "text": text, "context": 24, "model_batch": 3, "buffer_tokens": 320, "held_out": 0.3}
    train = {"batch_tokens": 32, "steps": 60, "eval_tokens": 200}
    settings = {"path": model, "device": "cpu"}
    return read_recipe(tables(source=source, train=train, model=settings), plugins=plugins())


def start(recipe: Recipe, out: Path, **options: Any) -> int:
    """Fork a generation."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        clt_datasets.make.generate.generate(recipe, out, **options)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a data set."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def chunks_of(folder: Path) -> int:
    return len(list(folder.glob("*.h5"))) if folder.exists() else 0


def wait_for_chunks(child: int, folder: Path, wanted: int) -> None:
    """Until a generation has written so many chunks, or has ended."""
    while chunks_of(folder) < wanted and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)


def main(folder: Path, kills: int, model: str | None = None, text: str | None = None) -> None:
    recipe = make_recipe(model, text)
    options: dict[str, Any] = {"chunk_bytes": 400_000 if model is None else 30_000, "block_rows": 8}
    started = time.perf_counter()
    _, status = os.waitpid(start(recipe, folder / "unbroken", **options), 0)
    assert status == 0, status
    unbroken = content(folder / "unbroken")
    all_chunks = chunks_of(folder / "unbroken")
    a_chunk_s = (time.perf_counter() - started) / all_chunks
    draw = random.Random(0)
    chunks: list[int] = []
    number = 0
    while len(chunks) < kills:
        out = folder / f"broken_{number}"
        while not (out / "manifest.json").is_file():
            child = start(recipe, out, **options)
            if len(chunks) < kills:
                # By what is written and not by the clock: a machine is not equally fast all the time.
                wait_for_chunks(child, out, chunks_of(out) + draw.randint(0, all_chunks // 4))
                time.sleep(draw.uniform(0, a_chunk_s))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or status == 0, status
            if os.WIFSIGNALED(status):
                chunks.append(chunks_of(out))
        assert content(out) == unbroken, f"{out} differs from the unbroken one"
        number += 1
    print(json.dumps({"kills": len(chunks), "chunks": chunks, "of": len(unbroken) - 2, "finished": number}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
