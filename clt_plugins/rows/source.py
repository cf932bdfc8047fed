"""A source of stored rows: blocks from all over the store are read into a buffer, shuffled there, and cut into batches.

While the batches of one group of rows are made, threads read the next group. So memory holds two groups and a few
batches. The position is the number of rows that were yielded; `deal` computes group and offset from it.

Threads: one cuts batches (`batcher`), one reads groups (`loader`), several read blocks for it (`readers`).

Shapes: B tokens, L layers, D d_model, R rows.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import Tensor

from clt_plugins.data.batch import Batch
from clt_plugins.data.random import generator
from clt_plugins.errors import DamagedError, Refused
from clt_plugins.rows.deal import Deal, Group
from clt_plugins.rows.identity import check_data
from clt_plugins.rows.order import Order
from clt_plugins.rows.store import AHEAD, Buffer, Shelf, Store, empty, tensors

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context

logger = logging.getLogger(__name__)

READERS = 4
"""Blocks that are read at a time: enough to keep a disk or a connection busy."""


@attrs.define(eq=False)
class Border:
    """A block that two groups share; it is read once for both."""

    begin: int
    """The number of its first row."""
    block: Batch | None = None
    """Its rows, once they are read."""


class StoredSource:
    """A `Source` over a `Store`: every row of an epoch once, over all data ranks; epochs follow each other.

    It is also `Identified` and `Buffered`. A state is valid for any number of data ranks.

    Args:
        buffer_tokens: R, the rows that are shuffled together, on each rank.
        on_corrupt: "stop" raises what `Store.read` raised; "skip" warns, and yields other rows of the same group
            instead of the damaged ones.
        setting: the recipe's setting that names the data, for `identity`.

    Raises:
        Refused: the batch is larger than the data or the buffer, or nothing is held out.
    """

    def __init__(
        self,
        store: Store,
        context: Context,
        *,
        buffer_tokens: int,
        on_corrupt: Literal["stop", "skip"] = "stop",
        setting: str = "source",
    ):
        self.store, self.on_corrupt, self.seed, self.setting = store, on_corrupt, context.seed, setting
        self.n_layers, self.d_model = store.n_layers, store.d_model
        ranks = context.parallel.data_ranks
        total = sum(store.chunks["train"])
        self.batch_tokens, self.held_out_tokens = context.batch_share(), context.batch_tokens
        if context.batch_tokens > total:
            raise Refused(
                "train.batch_tokens",
                f"a batch of {context.batch_tokens} tokens is larger than the data: "
                f"{store.name} has {total} to train on",
            )
        if buffer_tokens < self.batch_tokens:
            raise Refused("source.buffer_tokens", f"{buffer_tokens} is less than a batch of {self.batch_tokens} tokens")
        if not sum(store.chunks["held_out"]):
            raise Refused(store.name, "holds no held-out tokens, without which a run cannot be evaluated")
        group = min(buffer_tokens * ranks, total)
        self.deal = Deal(self.seed, group, context.parallel.data_rank, ranks, epoch=total)
        self.order = Order(store.chunks["train"], store.block_rows, self.seed, "blocks", 0)
        self.epoch = 0
        self.position = 0
        """Rows that were yielded on this rank, since the number of ranks was last changed."""
        self.filling, self.spare = (Buffer(-(-group // ranks), store) for _ in range(2))
        """The buffer that was given to the loader last, and the one that it gets next."""
        self.border: Border | None = None
        """The block in which the last group ended."""
        self.shelf = Shelf(pinned=context.device.type == "cuda")
        self.readers = ThreadPoolExecutor(READERS, "clt-read")
        self.loader = ThreadPoolExecutor(1, "clt-load")
        self.batcher = ThreadPoolExecutor(1, "clt-batch")
        self.ahead: deque[Future[Batch]] = deque()
        """The next batches, made before they are asked for."""
        self.groups: dict[int, tuple[Group, Future[Buffer]]] = {}
        """By their start: the group in use, and the next one."""

    # -- the Source protocol ------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next batch, in the store's type."""
        while len(self.ahead) < 1 + AHEAD:
            begin = self.position + len(self.ahead) * self.batch_tokens
            self.ahead.append(self.batcher.submit(self._make, begin))
        batch = self.ahead.popleft().result()
        self.position += self.batch_tokens
        return batch

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """The first rows of the held-out part, in their stored order.

        In batches as large as a training batch of all ranks, so that they are the same on any number of ranks: what an
        activation keeps may depend on the batch.
        """
        blocks = self._held_out_rows()
        left = min(tokens, sum(self.store.chunks["held_out"]))
        block = None
        while left > 0:
            out = empty(min(self.held_out_tokens, left), self.store, torch.empty)
            filled = 0
            while filled < out.tokens:
                block = block if block is not None and block.tokens else next(blocks)
                count = min(out.tokens - filled, block.tokens)
                for source, target in zip(tensors(block), tensors(out), strict=True):
                    target[filled : filled + count] = source[:count]
                block, filled = block.rows(slice(count, None)), filled + count
            left -= out.tokens
            yield out

    def statistics(self) -> Mapping[str, Tensor] | None:
        """The statistics that are stored with the data."""
        return self.store.statistics()

    def identity(self) -> Mapping[str, str]:
        """See `Identified`."""
        return {self.setting: self.store.identity}

    def buffer_bytes(self) -> Mapping[str, int]:
        """Two buffers, and the batches that are ready or in use."""
        rows = self.filling.rows.tokens + self.spare.rows.tokens + (1 + AHEAD) * self.batch_tokens
        return {"cpu": rows * 2 * self.n_layers * self.d_model * self.store.dtype.itemsize}

    def state(self) -> dict[str, Any]:
        """The position in the stream; the same on every data rank."""
        return {"data": dict(self.identity()), **self.deal.state(self.position)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a state; its group is read at the next batch.

        Other data ranks may have saved it, more or fewer: what they left of their group is dealt first.

        Raises:
            Refused: the state is of other data.
        """
        check_data(state, self.identity())
        self._drop()
        self.position = self.deal.load_state(state)

    def close(self) -> None:
        """Stop the threads; close the store; release all memory except that of batches that are still in use."""
        for each in (self.batcher, self.loader, self.readers):
            each.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        for each in (self.batcher, self.loader, self.readers):
            each.shutdown(wait=True)
        # Somebody may hold a closed source for long; and reference cycles through threads are freed late.
        self.ahead.clear()
        self.groups.clear()
        self.filling = self.spare = Buffer(1, self.store)
        self.border = None
        self.shelf.close()

    # -- batches ------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Forget batches and groups that are ready."""
        for future in self.ahead:
            future.cancel()
        # Each thread's last task: afterwards nothing writes into the buffers.
        self.batcher.submit(int).result()
        self.loader.submit(int).result()
        self.ahead.clear()
        self.groups.clear()
        self.border = None

    def _make(self, position: int) -> Batch:
        """The batch that begins after `position` rows; in the batcher's thread."""
        out = empty(self.batch_tokens, self.store, self.shelf.take)
        filled = 0
        while filled < self.batch_tokens:
            group, buffer = self._group(position + filled)
            offset = position + filled - group.start
            count = min(self.batch_tokens - filled, group.count - offset)
            index = buffer.order[offset : offset + count]
            for source, target in zip(tensors(buffer.rows), tensors(out), strict=True):
                torch.index_select(source, 0, index, out=target[filled : filled + count])
            filled += count
        return out

    def _group(self, position: int) -> tuple[Group, Buffer]:
        """The group of a row and its buffer; begins to read the group after it."""
        group = self.deal.at(position)
        # Batches are made in order, so the groups before are used up, and the buffer they were in is the spare one.
        self.groups = {start: held for start, held in self.groups.items() if start >= group.start}
        following = self.deal.at(group.start + group.count)
        for needed in (group, following):
            if needed.start not in self.groups:
                self.filling, self.spare = self.spare, self.filling
                self.groups[needed.start] = needed, self.loader.submit(self._load, needed, self.filling)
        return group, self.groups[group.start][1].result()

    def _load(self, group: Group, buffer: Buffer) -> Buffer:
        """Read a group's blocks into a buffer and draw the order of its rows; in the loader's thread."""
        epoch, first = divmod(int(group.rows[0]), self.deal.epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = Order(self.store.chunks["train"], self.store.block_rows, self.seed, "blocks", epoch)
        position = self.order.position(first)
        begin = epoch * self.deal.epoch + self.order.before(position)
        filled, readings = 0, []
        border, self.border = self.border, None
        while filled < group.count:
            chunk, row, rows = self.order.block(position)
            chosen = group.among(begin, begin + rows)
            count = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
            if count:
                into = buffer.rows.rows(slice(filled, filled + count))
                if border is None or border.begin != begin:
                    border = Border(begin)
                if count == rows:
                    reading = self.readers.submit(self.store.read, "train", chunk, row, into)
                else:
                    reading = self.readers.submit(self._read_part, border, chunk, row, rows, chosen, into)
                readings.append((filled, count, reading))
            filled, position, begin = filled + count, position + 1, begin + rows
        damaged = []
        for first, rows, reading in readings:
            try:
                reading.result()
            except DamagedError as error:
                if self.on_corrupt == "stop":
                    raise
                logger.warning("skipped: %s", error)
                damaged.append((first, rows))
        # The next group of this rank may have the rest of the block.
        if border is not None and int(group.rows[-1]) + 1 < begin:
            self.border = border
        buffer.order = group.order(self.seed)
        if damaged:
            buffer.order = self._without(damaged, buffer.order, generator(self.seed, "damaged", *group.key))
        return buffer

    def _read_part(self, border: Border, chunk: int, row: int, rows: int, chosen: slice | Tensor, into: Batch) -> None:
        """Read a block and copy some of its rows; in a reader's thread."""
        if border.block is None:
            block = Buffer(rows, self.store).rows
            self.store.read("train", chunk, row, block)
            border.block = block
        for source, target in zip(tensors(border.block), tensors(into), strict=True):
            target.copy_(source[chosen])

    def _without(self, damaged: list[tuple[int, int]], order: Tensor, random: torch.Generator) -> Tensor:
        """The same order with other rows instead of the damaged ones.

        Raises:
            DamagedError: all rows of the group are damaged.
        """
        damaged_rows = torch.zeros(len(order), dtype=torch.bool)
        for first, rows in damaged:
            damaged_rows[first : first + rows] = True
        lost = damaged_rows[order]
        good = order[~lost]
        if not len(good):
            raise DamagedError(f"{self.store.name}: all {len(order)} rows that are shuffled together are damaged")
        order = order.clone()
        order[lost] = good[torch.randint(len(good), (int(lost.sum()),), generator=random)]
        return order

    def _held_out_rows(self) -> Iterator[Batch]:
        """The held-out blocks, one after the other."""
        chunks = self.store.chunks["held_out"]
        buffer = Buffer(min(self.store.block_rows, max(chunks)), self.store)
        for chunk, rows in enumerate(chunks):
            for begin in range(0, rows, self.store.block_rows):
                into = buffer.rows.rows(slice(0, min(self.store.block_rows, rows - begin)))
                self.store.read("held_out", chunk, begin, into)
                yield into
