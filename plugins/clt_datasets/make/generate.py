"""`generate`: stores the rows of a recipe's source as a data set, and continues after a kill at any moment.

1. `make_plan`, `claim_folder`: settings, and a folder in which nothing else is.
2. `Writer`: held-out rows (rank 0), then rows to train on. A chunk is complete or absent, and holds the source's state.
3. `_finish`: the process that finds the chunks of all ranks complete writes statistics and manifest.
4. `_publish`: those two are passed on, after all chunks.

Of several processes (`torchrun`) each writes the chunks of its own share of the batches. They never speak to each
other: what is in the folder tells them enough.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clt_datasets.format.chunk import read_summary
from clt_datasets.format.manifest import MANIFEST, STATISTICS, read_manifest, write_manifest
from clt_datasets.make.plan import Plan, claim_folder, make_plan, this_process
from clt_datasets.make.writer import HELD_OUT, Writer
from clt_plugins import Closable, Single, build_source

if TYPE_CHECKING:
    from clt_plugins import Recipe

Written = Callable[[Path], None]


def generate(
    recipe: Recipe,
    out: Path,
    *,
    tokens: int | None = None,
    held_out: int | None = None,
    dtype: str = "source",
    compression: str = "none",
    chunk_bytes: int = 256 * 2**20,
    block_rows: int = 0,
    written: Written = lambda path: None,
) -> None:
    """Write a data set, or what is missing of it.

    Args:
        tokens: rows to train on; by default as many as the recipe trains on.
        held_out: held-out rows; by default as many as the recipe evaluates on.
        block_rows: rows of a block; 0 makes blocks of about 4 MiB.
        written: called with each complete file of this process, also with those that were there; the manifest is last.

    Raises:
        Refused: the folder holds something else, or the source cannot be stored so.
        OSError: a chunk could not be written; what was written stays.
    """
    process = this_process()
    plan = make_plan(
        recipe,
        process.data_ranks,
        tokens,
        held_out,
        compression,
        dtype=dtype,
        chunk_bytes=chunk_bytes,
        block_rows=block_rows,
    )
    claim_folder(out, plan)
    if (out / MANIFEST).is_file():
        print(f"{out}: complete already", file=sys.stderr)
        _publish_again(out, process, written)
        return
    sites = _write(recipe, out, plan, process, written)
    if _finish(out, plan, sites):
        _publish(out, written)


def _write(recipe: Recipe, out: Path, plan: Plan, process: Single, written: Written) -> object:
    """Write this process's chunks; returns the sites that the source reads, if it has any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    source = build_source(recipe, process)
    writer = Writer(out, plan, process.rank, source, written)
    try:
        if process.rank == 0:
            writer.held_out()
        writer.train()
        return getattr(source, "sites", None)
    finally:
        writer.close()
        if isinstance(source, Closable):
            source.close()


def _finish(out: Path, plan: Plan, sites: object) -> bool:
    """Write statistics and manifest, if the chunks of all ranks are there; returns whether they were.

    The last two processes may both find everything complete. They then write the same files.
    """
    marker = out / HELD_OUT
    rows = {"train": plan.tokens, "held_out": json.loads(marker.read_text())["rows"]} if marker.is_file() else {}
    # By length first: after train_99999 comes train_100000.
    paths = {part: sorted(out.glob(f"{part}_*.h5"), key=lambda path: (len(path.name), path.name)) for part in rows}
    if not rows or any(sum(read_summary(path).rows for path in paths[part]) < rows[part] for part in rows):
        print(f"{out}: this process has written its share; another one still writes", file=sys.stderr)
        return False
    about = {
        "model": plan.model,
        "sites": sites,
        "source": plan.source,
        "seed": plan.seed,
        "batch_tokens": plan.batch_tokens,
    }
    write_manifest(out, paths["train"] + paths["held_out"], about)
    print(f"{out}: {rows['train']:,} tokens to train on, {rows['held_out']:,} held out", file=sys.stderr)
    return True


def _publish(out: Path, written: Written) -> None:
    """Pass on the files that come last."""
    written(out / STATISTICS)
    written(out / MANIFEST)


def _publish_again(out: Path, process: Single, written: Written) -> None:
    """Pass on the files of a complete data set, each of them by one process."""
    for number, chunk in enumerate(read_manifest(out).chunks):
        if number % process.data_ranks == process.rank:
            written(out / chunk.file)
    if process.rank == 0:
        _publish(out, written)
