"""`generate`: a recipe's source, written to a data set; goes on after a kill at any moment.

Every chunk keeps the source's state after it, and is written whole or not at all: so the whole chunks in the folder say
where to go on. Of several processes (`torchrun`) each writes the chunks of its own share of the batches; whoever finds
all of them whole writes the manifest.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
import xxhash
from tqdm import tqdm

from clt_datasets.format.chunk import Style, Summary, compression_library, read_summary, write_chunk
from clt_datasets.format.encode import statistics
from clt_datasets.format.manifest import (
    DTYPES,
    MANIFEST,
    STATISTICS,
    Chunk,
    Manifest,
    default_block_rows,
    read_manifest,
    replace,
)
from clt_datasets.make.plan import Plan, prepare
from clt_datasets.make.plan import share as this_share
from clt_plugins import Batch, DamagedError, Refused, Single, build_source, recipe_data

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.recipe.read import Recipe
    from clt_plugins.registry.plugins import Plugins

log = logging.getLogger(__name__)

HELD_OUT = ".held_out.json"


def generate(
    recipe: Recipe,
    plugins: Plugins,
    out: Path,
    *,
    tokens: int | None = None,
    held_out: int | None = None,
    dtype: str = "source",
    compression: str = "none",
    chunk_bytes: int = 256 * 2**20,
    block_rows: int = 0,
    written: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write a data set, or what is missing of it.

    Args:
        tokens: rows to train on; as many as the recipe trains on if not given.
        held_out: held-out rows; as many as the recipe evaluates on if not given.
        written: called with each file of this process, also those found whole; the manifest comes last.

    Raises:
        ValueError: the folder holds something else, or the source cannot be stored so.
        OSError: a chunk could not be written; what was written stays.
    """
    share, data = this_share(), recipe_data(recipe)
    plan = Plan(
        tokens=recipe.train.steps * recipe.train.batch_tokens if tokens is None else tokens,
        held_out=recipe.train.eval_tokens if held_out is None else held_out,
        dtype=dtype,
        compression=compression,
        chunk_bytes=chunk_bytes,
        block_rows=block_rows,
        batch_tokens=recipe.train.batch_tokens,
        ranks=share.data_ranks,
        seed=recipe.seed,
        model=data.get("model"),
        source=data["source"],
    )
    if compression != "none":
        compression_library()
    if plan.batch_tokens % plan.ranks:
        raise Refused("train.batch_tokens", f"{plan.batch_tokens} cannot be divided among {plan.ranks} data ranks")
    if plan.tokens < plan.ranks or plan.held_out < 0:
        raise Refused("--tokens", f"at least one per process, got {plan.tokens}")
    prepare(out, plan)
    if (out / MANIFEST).is_file():
        print(f"{out}: whole already", file=sys.stderr)
        for chunk in read_manifest(out).chunks:
            written(out / chunk.file)
        _publish(out, written)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    source = build_source(recipe, share)
    try:
        with ThreadPoolExecutor(1, "clt-write") as thread:
            writer = Writer(out, plan, source, thread, share, written)
            if share.rank == 0:
                writer.held_out()
            writer.train()
    finally:
        if hasattr(source, "close"):
            source.close()
    if _finish(out, plan, source):
        _publish(out, written)


def _publish(out: Path, written: Callable[[Path], None]) -> None:
    """Hand over what comes last."""
    written(out / STATISTICS)
    written(out / MANIFEST)


class Writer:
    """Cuts batches into chunks and writes them in another thread while the source goes on."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        source: Source,
        thread: ThreadPoolExecutor,
        share: Single,
        written: Callable[[Path], None],
    ):
        self.out, self.plan, self.source, self.thread, self.share = out, plan, source, thread, share
        self.written = written
        self.rooms: list[Batch] = []
        self.pending: Future[None] | None = None

    def train(self) -> None:
        """Write this rank's rows to train on, from the first chunk that is missing on."""
        total = self.plan.share(self.share.rank)
        number, rows, state = 0, 0, None
        while rows < total and (found := self._whole(self._path("train", number))) is not None:
            number, rows, state = number + 1, rows + found.rows, found.state
            self.thread.submit(self.written, self._path("train", number - 1)).result()
        if state is not None:
            self.source.load_state(state)
        self._write("train", number, self._batches(total - rows), rows, total)

    def held_out(self) -> None:
        """Write the held-out rows, where that was not done."""
        marker = self.out / HELD_OUT
        total = self.plan.held_out
        if not marker.is_file():
            rows = self._write("held_out", 0, self.source.held_out(total), 0, total) if total else 0
            replace(marker, json.dumps({"rows": rows}).encode())
        else:
            for name in sorted(path.name for path in self.out.glob("held_out_*.h5")):
                self.written(self.out / name)

    def _batches(self, total: int) -> Iterator[Batch]:
        while total > 0:
            batch = self.source.next()
            yield batch if batch.tokens <= total else batch.rows(slice(0, total))
            total -= batch.tokens

    def _write(self, part: str, number: int, batches: Iterator[Batch], done: int, total: int) -> int:
        """Write batches as chunks; returns the rows of the part."""
        bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=part, disable=None, dynamic_ncols=True)
        at, room = 0, None
        with bar:
            for batch in batches:
                room = room or self._room(batch)
                if at + batch.tokens > room.tokens:
                    self._hand_over(self._path(part, number), room.rows(slice(0, at)), {})
                    number, at, room = number + 1, 0, self._room(batch)
                _copy(batch, room.rows(slice(at, at + batch.tokens)))
                at += batch.tokens
                done += batch.tokens
                bar.update(batch.tokens)
                if at == room.tokens:
                    self._hand_over(self._path(part, number), room, self.source.state())
                    number, at, room = number + 1, 0, None
            if at and room is not None:
                self._hand_over(self._path(part, number), room.rows(slice(0, at)), self.source.state())
            self._settle()
        return done

    def _hand_over(self, path: Path, rows: Batch, state: dict[str, Any]) -> None:
        """Have a chunk written, after the one before."""
        self._settle()
        plan = self.plan
        given = str(rows.inputs.dtype).removeprefix("torch.")
        dtype = plan.dtype if plan.dtype != "source" else given if given in DTYPES else "float32"
        style = Style(dtype, plan.compression, plan.block_rows or default_block_rows(_row_bytes(rows, dtype)))

        def work() -> None:
            write_chunk(path, rows, style, state)
            self.written(path)

        self.pending = self.thread.submit(work)

    def _settle(self) -> None:
        if self.pending is not None:
            self.pending.result()
        self.pending = None

    def _room(self, like: Batch) -> Batch:
        """Room for a chunk: one of two, in turn."""
        if len(self.rooms) < 2:
            count = self.plan.chunk_rows(_row_bytes(like, str(like.inputs.dtype).removeprefix("torch.")))

            def empty(x: torch.Tensor) -> torch.Tensor:
                return torch.empty(count, *x.shape[1:], dtype=x.dtype)

            known = [x for x in (like.inputs, like.targets, like.token_ids, like.positions) if x is not None]
            self.rooms.append(Batch(*map(empty, known)))
        self.rooms.reverse()
        return self.rooms[0]

    def _path(self, part: str, number: int) -> Path:
        ranks, rank = (self.plan.ranks, self.share.rank) if part == "train" else (1, 0)
        return self.out / f"{part}_{number * ranks + rank:05}.h5"

    def _whole(self, path: Path) -> Summary | None:
        """What a chunk says of itself, if it was written."""
        try:
            return read_summary(path) if path.is_file() else None
        except DamagedError as error:
            log.warning("written again: %s", error)
            return None


def _row_bytes(rows: Batch, dtype: str) -> int:
    return 2 * rows.inputs[0].numel() * np.dtype(DTYPES.get(dtype, "<f4")).itemsize + 20


def _copy(batch: Batch, into: Batch) -> None:
    for name in ("inputs", "targets", "token_ids", "positions"):
        if getattr(into, name) is not None:
            getattr(into, name).copy_(getattr(batch, name))


def _finish(out: Path, plan: Plan, source: Source) -> bool:
    """Write statistics and manifest, if all ranks' chunks are there; says whether they were."""
    marker = out / HELD_OUT
    rows = {"train": plan.tokens, "held_out": json.loads(marker.read_text())["rows"]} if marker.is_file() else {}
    paths = {part: sorted(out.glob(f"{part}_*.h5"), key=lambda p: (len(p.name), p.name)) for part in rows}
    found = {path: read_summary(path) for part in paths.values() for path in part}
    if not rows or any(sum(found[path].rows for path in paths[part]) < count for part, count in rows.items()):
        print(f"{out}: this process's share is written; another one still writes", file=sys.stderr)
        return False
    write_manifest(
        out,
        paths["train"] + paths["held_out"],
        about={
            "model": plan.model,
            "sites": getattr(source, "sites", None),
            "source": plan.source,
            "seed": plan.seed,
            "batch_tokens": plan.batch_tokens,
        },
    )
    marker.unlink(missing_ok=True)
    print(f"{out}: {rows['train']:,} tokens to train on, {rows['held_out']:,} held out", file=sys.stderr)
    return True


def write_manifest(out: Path, paths: list[Path], about: dict[str, Any]) -> None:
    """Write statistics and manifest of the chunks in a folder."""
    from safetensors.torch import save

    summaries = [read_summary(path) for path in paths]
    first = summaries[0]
    trained = [each for path, each in zip(paths, summaries, strict=True) if path.name.startswith("train")]
    tensors, nmse = statistics([(s.rows, s.moments) for s in trained], np.sum([s.errors for s in trained], 0))
    data = save(tensors)
    replace(out / STATISTICS, data)
    chunks = tuple(
        Chunk(path.name, path.name.rpartition("_")[0], s.rows, path.stat().st_size, s.checksum)  # type: ignore[arg-type]
        for path, s in zip(paths, summaries, strict=True)
    )
    manifest = Manifest(
        layers=first.moments.shape[2],
        d_model=first.moments.shape[3],
        **attrs.asdict(first.style),
        has_tokens=first.has_tokens,
        tokens={part: sum(c.rows for c in chunks if c.part == part) for part in ("train", "held_out")},
        chunks=chunks,
        statistics=xxhash.xxh3_128_hexdigest(data),
        rounding_nmse=nmse,
        about=about,
    )
    replace(out / MANIFEST, manifest.to_json())
