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

import attrs
import numpy as np
import torch
from tqdm import tqdm

from clt_datasets.format.chunk import DTYPES, Style, write_chunk
from clt_datasets.format.files import write_file
from clt_datasets.format.manifest import default_block_rows
from clt_datasets.make.ledger import Ledger
from clt_datasets.make.plan import Plan
from clt_plugins import Batch, DamagedError, Refused, Source, load_json

Written = Callable[[Path, str | None], None]
"""Called with a complete file, and with its XXH3-128 if that is known."""

log = logging.getLogger(__name__)

HELD_OUT = ".held_out.json"
"""Written when all held-out chunks are there: how many rows they have."""


@attrs.frozen
class There:
    """What is needed of a chunk that is there: its moments would fill the memory."""

    rows: int
    state: dict[str, Any]


class Writer:
    """Writes one rank's chunks.

    Args:
        written: called with each file when it is complete, also with those that are there already.
        ledger: knows which of them need not be read again.
        largest: bytes that a block may have.
    """

    def __init__(
        self, out: Path, plan: Plan, rank: int, source: Source, written: Written, ledger: Ledger, largest: int
    ):
        self.out, self.plan, self.rank, self.source, self.written = out, plan, rank, source, written
        self.ledger, self.largest = ledger, largest
        self.made = 0
        """Chunks that were written."""
        self.looked_at: dict[Path, There | None] = {}
        """The chunks that were looked at, and passed on; None for those that are missing or damaged."""
        self.thread = ThreadPoolExecutor(1, "clt-write")
        self.pending: Future[None] | None = None
        """The chunk that is being written."""
        self.buffers: list[Batch] = []
        """Two in turn: one is filled while the other is written."""

    def held_out(self) -> None:
        """Write the held-out rows, or what is missing of them."""
        marker, total = self.out / HELD_OUT, self.plan.held_out
        rows = read_held_out(self.out)
        number = counted = 0
        while rows is not None and counted < rows and (chunk := self._look(self._path("held_out", number))) is not None:
            number, counted = number + 1, counted + chunk.rows
        if rows is not None and counted == rows:
            return
        written = self._write("held_out", 0, self.source.held_out(total), 0, total)[0] if total else 0
        write_file(marker, json.dumps({"rows": written}).encode())

    def train(self) -> None:
        """Write this rank's rows to train on, or what is missing of them."""
        total = self.plan.rows(self.rank)
        number, rows, state = 0, 0, None
        while rows < total:
            if (chunk := self._look(self._path("train", number))) is not None:
                number, rows, state = number + 1, rows + chunk.rows, chunk.state
                continue
            if state is not None:
                self.source.load_state(state)
                state = None
            rows, number = self._write("train", number, self._batches(total - rows), rows, total)

    def close(self) -> None:
        """Wait for the thread."""
        self.thread.shutdown()

    def _batches(self, total: int) -> Iterator[Batch]:
        """Batches with `total` rows in all; the last one is cut."""
        while total > 0:
            batch = self.source.next()
            yield batch if batch.tokens <= total else batch.rows(slice(0, total))
            total -= batch.tokens

    def _write(self, part: str, number: int, batches: Iterator[Batch], done: int, total: int) -> tuple[int, int]:
        """Write batches as chunks. Of rows to train on, up to the next chunk that is there.

        Args:
            number: of the first chunk.
            done: rows of the part that are there already.
            total: rows of the part.

        Returns:
            The rows of the part that are there now, and the number of the next chunk.
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
                    if part == "train" and done < total and self._look(self._path(part, number)) is not None:
                        break
            if buffer is not None:
                self._hand_over(self._path(part, number), buffer.rows(slice(0, filled)), self.source.state())
                number += 1
            self._settle()
        return done, number

    def _hand_over(self, path: Path, rows: Batch, state: dict[str, Any]) -> None:
        """Have the thread write a chunk, when the chunk before is written, unless it is there."""
        self._settle()
        there = self._look(path)
        if there is not None and there.rows == rows.tokens:
            return
        plan, dtype = self.plan, self.plan.dtype
        if dtype == "source":
            dtype = _name(rows.inputs.dtype) if _name(rows.inputs.dtype) in DTYPES else "float32"
        row_bytes = _row_bytes(rows, dtype)
        style = Style(dtype, plan.compression, plan.block_rows or default_block_rows(row_bytes))
        if min(style.block_rows, rows.tokens) * row_bytes > self.largest:
            most = max(1, self.largest // row_bytes)
            raise Refused("--block-rows", f"a block may have {self.largest:,} bytes, which are {most} rows")

        def work() -> None:
            digest = write_chunk(path, rows, style, state)
            self.ledger.add(path, digest)
            self.made += 1
            self.written(path, digest)

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

    def _look(self, path: Path) -> There | None:
        """A chunk that is there, which is passed on; None if it is missing or damaged."""
        if path not in self.looked_at:
            self.looked_at[path] = None
            if path.exists() or path.name in self.ledger.lines:
                try:
                    summary, digest = self.ledger.check(path)
                except DamagedError as error:
                    log.warning("written again: %s", error)
                else:
                    block_bytes = min(summary.style.block_rows, summary.rows) * summary.row_bytes
                    check_blocks(block_bytes, summary.row_bytes, self.largest)
                    self.written(path, digest)
                    self.looked_at[path] = There(summary.rows, summary.state)
        return self.looked_at[path]


def check_blocks(block_bytes: int, row_bytes: int, largest: int) -> None:
    """Refuse blocks, of files that are there, that have more bytes than they may."""
    if block_bytes > largest:
        text = f"a block may have {largest:,} bytes, and those of this folder have {block_bytes:,}"
        most = max(1, largest // row_bytes)
        raise Refused("--block-rows", f"{text}: generate with --block-rows {most} or fewer, into another folder")


def read_held_out(out: Path) -> int | None:
    """How many held-out rows there are; None if not all are written.

    Raises:
        Refused: the file that says so is damaged.
    """
    path = out / HELD_OUT
    if not path.exists():
        return None
    table = load_json(path)
    rows = table.get("rows") if isinstance(table, dict) else None
    if type(rows) is not int or rows < 0:
        raise Refused(path, "damaged: delete it, and the held-out rows are written again")
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_bytes(rows: Batch, dtype: str) -> int:
    """Bytes of a row that is stored in a type, with token id (4) and position (16)."""
    return 2 * rows.inputs[0].numel() * np.dtype(DTYPES.get(dtype, "<f4")).itemsize + 20


def _copy(batch: Batch, into: Batch) -> None:
    for name in ("inputs", "targets", "token_ids", "positions"):
        if getattr(into, name) is not None:
            getattr(into, name).copy_(getattr(batch, name))
