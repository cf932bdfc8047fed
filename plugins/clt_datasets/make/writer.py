"""Writes a source's batches as chunks, in a thread of its own, while the source continues.

Each chunk holds the source's state after it. So the chunks that are there say where to continue.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.format.chunk import Style, Summary, read_summary, write_chunk
from clt_datasets.format.files import write_file
from clt_datasets.format.manifest import DTYPES, default_block_rows
from clt_datasets.make.plan import Plan
from clt_plugins import Batch, DamagedError, Source

log = logging.getLogger(__name__)

HELD_OUT = ".held_out.json"
"""Written when all held-out chunks are there: how many rows they have."""


class Writer:
    """Writes one rank's chunks.

    Args:
        written: called with each file when it is complete, also with those that are there already.
    """

    def __init__(self, out: Path, plan: Plan, rank: int, source: Source, written: Callable[[Path], None]):
        self.out, self.plan, self.rank, self.source, self.written = out, plan, rank, source, written
        self.thread = ThreadPoolExecutor(1, "clt-write")
        self.pending: Future[None] | None = None
        """The chunk that is being written."""
        self.buffers: list[Batch] = []
        """Two in turn: one is filled while the other is written."""

    def held_out(self) -> None:
        """Write the held-out rows, unless all of them are there."""
        marker, total = self.out / HELD_OUT, self.plan.held_out
        if marker.is_file():
            for path in sorted(self.out.glob("held_out_*.h5")):
                self.written(path)
            return
        rows = self._write("held_out", 0, self.source.held_out(total), 0, total) if total else 0
        write_file(marker, json.dumps({"rows": rows}).encode())

    def train(self) -> None:
        """Write this rank's rows to train on, from the first chunk on that is missing."""
        total = self.plan.rows(self.rank)
        number, rows, state = 0, 0, None
        while rows < total and (summary := self._complete(self._path("train", number))) is not None:
            self.written(self._path("train", number))
            number, rows, state = number + 1, rows + summary.rows, summary.state
        if state is not None:
            self.source.load_state(state)
        self._write("train", number, self._batches(total - rows), rows, total)

    def close(self) -> None:
        """Wait for the thread."""
        self.thread.shutdown()

    def _batches(self, total: int) -> Iterator[Batch]:
        """Batches with `total` rows in all; the last one is cut."""
        while total > 0:
            batch = self.source.next()
            yield batch if batch.tokens <= total else batch.rows(slice(0, total))
            total -= batch.tokens

    def _write(self, part: str, number: int, batches: Iterator[Batch], done: int, total: int) -> int:
        """Write batches as chunks.

        Args:
            number: of the first chunk.
            done: rows of the part that are there already.
            total: rows of the part.

        Returns:
            The rows of the part that are there now.
        """
        bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=part, disable=None, dynamic_ncols=True)
        buffer, filled = None, 0
        with bar:
            for batch in batches:
                if buffer is not None and filled + batch.tokens > buffer.tokens:
                    # Only held-out batches, which may have any size. Those are never continued: no state is needed.
                    self._hand_over(self._path(part, number), buffer.rows(slice(0, filled)), {})
                    buffer, filled, number = None, 0, number + 1
                if buffer is None:
                    buffer = self._next_buffer(batch)
                _copy(batch, buffer.rows(slice(filled, filled + batch.tokens)))
                filled += batch.tokens
                done += batch.tokens
                bar.update(batch.tokens)
                if filled == buffer.tokens:
                    self._hand_over(self._path(part, number), buffer, self.source.state())
                    buffer, filled, number = None, 0, number + 1
            if buffer is not None:
                self._hand_over(self._path(part, number), buffer.rows(slice(0, filled)), self.source.state())
            self._settle()
        return done

    def _hand_over(self, path: Path, rows: Batch, state: dict[str, Any]) -> None:
        """Have the thread write a chunk, when the chunk before is written."""
        self._settle()
        plan, dtype = self.plan, self.plan.dtype
        if dtype == "source":
            dtype = _name(rows.inputs.dtype) if _name(rows.inputs.dtype) in DTYPES else "float32"
        style = Style(dtype, plan.compression, plan.block_rows or default_block_rows(_row_bytes(rows, dtype)))

        def work() -> None:
            write_chunk(path, rows, style, state)
            self.written(path)

        self.pending = self.thread.submit(work)

    def _settle(self) -> None:
        """Wait for the chunk that is being written; raises what went wrong."""
        if self.pending is not None:
            self.pending.result()
        self.pending = None

    def _next_buffer(self, like: Batch) -> Batch:
        """The buffer that is not being written: of a chunk's rows, like those of a batch."""
        if len(self.buffers) < 2:
            count = self.plan.chunk_rows(_row_bytes(like, _name(like.inputs.dtype)))

            def empty(x: torch.Tensor) -> torch.Tensor:
                return torch.empty(count, *x.shape[1:], dtype=x.dtype)

            known = [x for x in (like.inputs, like.targets, like.token_ids, like.positions) if x is not None]
            self.buffers.append(Batch(*map(empty, known)))
        self.buffers.reverse()
        return self.buffers[0]

    def _path(self, part: str, number: int) -> Path:
        return self.plan.path(self.out, part, number, self.rank)

    def _complete(self, path: Path) -> Summary | None:
        """The summary of a chunk that was written; None if it is missing or damaged."""
        try:
            return read_summary(path) if path.is_file() else None
        except DamagedError as error:
            log.warning("written again: %s", error)
            return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_bytes(rows: Batch, dtype: str) -> int:
    """Bytes of a row that is stored in a type, with token id (4) and position (16)."""
    return 2 * rows.inputs[0].numel() * np.dtype(DTYPES.get(dtype, "<f4")).itemsize + 20


def _copy(batch: Batch, into: Batch) -> None:
    for name in ("inputs", "targets", "token_ids", "positions"):
        if getattr(into, name) is not None:
            getattr(into, name).copy_(getattr(batch, name))
