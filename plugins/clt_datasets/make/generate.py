"""`generate`: stores the rows of a recipe's source as a data set, and continues after a kill at any moment.

1. `make_plan`, `begin`: settings, what the source is made from, and a folder in which nothing else is.
2. `Writer`: held-out rows (rank 0), then rows to train on. A chunk is complete or absent, and holds the source's state.
   What is there is looked at (`Ledger`); what is missing or damaged is written again.
3. `_finish`: the process that finds the chunks of all ranks complete writes statistics and manifest, and passes them
   on, after all chunks.

Of several processes (`torchrun`) each writes the chunks of its own share of the batches. They never speak to each
other: what is in the folder tells them enough. Locks keep two from writing the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clt_datasets.format.chunk import read_summary
from clt_datasets.format.folder import LocalData
from clt_datasets.format.manifest import LARGEST_BLOCK, MANIFEST, STATISTICS, Part, read_manifest, write_manifest
from clt_datasets.make.begun import begin, check_folder, decides, one_process
from clt_datasets.make.ledger import Ledger
from clt_datasets.make.plan import Plan, make_plan, this_process
from clt_datasets.make.writer import Writer, Written, check_blocks, read_held_out
from clt_plugins import Closable, DamagedError, Identified, build_source

if TYPE_CHECKING:
    from clt_plugins import Recipe


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
    verify: bool = False,
    written: Written = lambda path, digest: None,
    largest_block: int = LARGEST_BLOCK,
) -> None:
    """Write a data set, or what is missing of it.

    Args:
        tokens: rows to train on; by default as many as the recipe trains on.
        held_out: held-out rows; by default as many as the recipe evaluates on.
        block_rows: rows of a block; 0 makes blocks of about 4 MiB.
        verify: read all chunks that are there, also those that have not changed since they were written.
        written: called with each complete file of this process, also with those that were there; the manifest is last.
        largest_block: bytes that a block may have.

    Raises:
        Refused: the folder holds something else, was begun with other settings or data, or another process writes into
            it; or the source cannot be stored so.
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
    check_folder(out, plan, recipe)
    with one_process(out, process.rank):
        if plan.ranks == 1:
            # Of a process that was killed. Other ranks may be writing theirs.
            for partial in out.glob(".*.partial"):
                partial.unlink()
        was_complete = (out / MANIFEST).exists()
        if was_complete:
            manifest = read_manifest(out)  # refuses a damaged one before anything is loaded
            check_blocks(manifest.largest_block, manifest.row_bytes, largest_block)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        source = build_source(recipe, process)
        content = dict(source.identity()) if isinstance(source, Identified) else {}
        about = _about(plan, getattr(source, "sites", None), content)
        try:
            begin(out, plan, recipe, content)
            ledger = Ledger(out / f".written_{process.rank}.jsonl", verify=verify)
            writer = Writer(out, plan, process.rank, source, written, ledger, largest_block)
            try:
                if process.rank == 0:
                    writer.held_out()
                writer.train()
            finally:
                writer.close()
        finally:
            if isinstance(source, Closable):
                source.close()
        with decides(out):
            publishes = process.rank == 0 or writer.made > 0 if was_complete else None
            _finish(out, plan, process.rank, about, written, publishes)


def _about(plan: Plan, sites: object, content: dict[str, str]) -> dict[str, object]:
    """What the manifest says about where the rows come from."""
    about = {"model": plan.model, "sites": sites, "source": plan.source, "seed": plan.seed}
    return {**about, "batch_tokens": plan.batch_tokens, **({"content": content} if content else {})}


def _finish(
    out: Path, plan: Plan, this_rank: int, about: dict[str, object], written: Written, publishes: bool | None
) -> None:
    """Write statistics and manifest, if the chunks of all ranks are there.

    Args:
        this_rank: whose chunks are all written.
        publishes: whether this process passes on those of a data set that was complete at the beginning; None if it
            was not: then the process that completes it does.

    Raises:
        DamagedError: a chunk of this process cannot be read.
    """
    held_out = read_held_out(out)
    train = [_chunks(out, plan, "train", rank, plan.rows(rank), rank == this_rank) for rank in range(plan.ranks)]
    kept = None if held_out is None else _chunks(out, plan, "held_out", 0, held_out, this_rank == 0)
    if kept is None or any(chunks is None for chunks in train):
        print(f"{out}: this process has written its share; another one still writes", file=sys.stderr)
        return
    # Ranks take turns.
    ordered = sorted((chunk for chunks in train for chunk in chunks or []), key=lambda chunk: (len(chunk[0]), chunk[0]))
    if _is_complete(out, ordered + kept):
        print(f"{out}: complete already", file=sys.stderr)
        if not publishes:
            return
    else:
        write_manifest(out, [out / name for name, *_ in ordered + kept], about)
        print(f"{out}: {plan.tokens:,} tokens to train on, {held_out:,} held out", file=sys.stderr)
    written(out / STATISTICS, None)
    written(out / MANIFEST, None)


Listed = tuple[str, int, int, str]
"""A chunk as manifests list it: file, bytes, rows, checksum."""


def _chunks(out: Path, plan: Plan, part: Part, rank: int, rows: int, written: bool) -> list[Listed] | None:
    """The chunks of a rank; None if they are not there yet.

    Args:
        written: whether its process has written them all. Another one may yet replace a damaged chunk.
    """
    chunks: list[Listed] = []
    counted = 0
    while counted < rows:
        path = plan.path(out, part, len(chunks), rank)
        try:
            summary = read_summary(path)
        except DamagedError:
            if written:
                raise
            return None
        chunks.append((path.name, path.stat().st_size, summary.rows, summary.checksum))
        counted += summary.rows
    return chunks


def _is_complete(out: Path, chunks: list[Listed]) -> bool:
    """Whether the manifest lists just these chunks, and the statistics are those that it lists."""
    if not (out / MANIFEST).exists():
        return False
    data = LocalData(out)
    if [(chunk.file, chunk.bytes, chunk.rows, chunk.checksum) for chunk in data.manifest.chunks] != chunks:
        return False
    try:
        data.statistics()
    except DamagedError:
        return False
    return True
