"""A source of stored rows: blocks from all over the store are read into a buffer, shuffled there, and cut into batches.

While the batches of one group of rows are made, threads read the next group. So memory holds two groups and a few
batches. The position is the number of rows that were yielded; `order` computes group and offset from it.

Threads: one cuts batches (`batcher`), one reads groups (`loader`), several read blocks for it (`readers`).

Shapes: B tokens, L layers, D d_model, R rows.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clt_plugins.data.batch import Batch
from clt_plugins.data.random import generator
from clt_plugins.errors import DamagedError, Refused
from clt_plugins.rows.order import Deal, Group, Order
from clt_plugins.rows.store import AHEAD, Buffer, Shelf, Store, empty, tensors

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context

logger = logging.getLogger(__name__)

READERS = 4
"""Blocks that are read at a time: enough to keep a disk or a connection busy."""


class StoredSource:
    """A `Source` over a `Store`: every row of an epoch once, over all data ranks; epochs follow each other.

    Args:
        buffer_tokens: R, the rows that are shuffled together, on each rank.
        on_corrupt: "stop" raises what `Store.read` raised; "skip" warns, and yields other rows of the same group
            instead of the damaged ones.

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
    ):
        self.store, self.on_corrupt, self.seed = store, on_corrupt, context.seed
        self.n_layers, self.d_model = store.n_layers, store.d_model
        ranks = context.parallel.data_ranks
        total = sum(store.chunks["train"])
        self.batch_tokens = context.batch_share()
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
        self.deal = Deal(total, min(buffer_tokens * ranks, total), context.parallel.data_rank, ranks)
        self.order = Order(store.chunks["train"], store.block_rows, self.seed, "blocks", 0)
        self.epoch = 0
        self.position = 0
        """Rows that were yielded on this rank."""
        group = min(buffer_tokens, -(-self.deal.group // ranks))
        # A group may begin and end in the middle of a block; whole blocks are read.
        self.filling, self.spare = (Buffer(group + 2 * store.block_rows, store) for _ in range(2))
        """The buffer that was given to the loader last, and the one that it gets next."""
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
        """The first rows of the held-out part, in their stored order."""
        blocks = self._held_out_rows()
        left = min(tokens, sum(self.store.chunks["held_out"]))
        block = None
        while left > 0:
            out = empty(min(self.batch_tokens, left), self.store, torch.empty)
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

    def state(self) -> dict[str, Any]:
        """The position in the stream; the same on every data rank."""
        return {"rows": self.position, "data": self.store.identity}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a state; its group is read at the next batch.

        Raises:
            Refused: the state is of other data.
        """
        if state["data"] != self.store.identity:
            raise Refused(self.store.name, "not the data that the state was saved with")
        self._drop()
        self.position = state["rows"]

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

    def _make(self, position: int) -> Batch:
        """The batch that begins after `position` rows; in the batcher's thread."""
        out = empty(self.batch_tokens, self.store, self.shelf.take)
        filled = 0
        while filled < self.batch_tokens:
            group, buffer = self._group(position + filled)
            offset = position + filled - group.start
            count = min(self.batch_tokens - filled, group.rows - offset)
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
        following = self.deal.at(group.start + group.rows)
        for needed in (group, following):
            if needed.start not in self.groups:
                self.filling, self.spare = self.spare, self.filling
                self.groups[needed.start] = needed, self.loader.submit(self._load, needed, self.filling)
        return group, self.groups[group.start][1].result()

    def _load(self, group: Group, buffer: Buffer) -> Buffer:
        """Read a group's blocks into a buffer and draw the order of its rows; in the loader's thread."""
        if group.epoch != self.epoch:
            self.epoch = group.epoch
            self.order = Order(self.store.chunks["train"], self.store.block_rows, self.seed, "blocks", group.epoch)
        position = self.order.position(group.begin)
        # The group may begin in the middle of a block, whose first rows belong to the group before.
        skipped = group.begin - self.order.before(position)
        filled, readings = 0, []
        while filled < skipped + group.rows:
            chunk, begin, rows = self.order.block(position)
            into = buffer.rows.rows(slice(filled, filled + rows))
            readings.append((filled, rows, self.readers.submit(self.store.read, "train", chunk, begin, into)))
            filled, position = filled + rows, position + 1
        damaged = []
        for first, rows, reading in readings:
            try:
                reading.result()
            except DamagedError as error:
                if self.on_corrupt == "stop":
                    raise
                logger.warning("skipped: %s", error)
                damaged.append((first, rows))
        random = generator(self.seed, "rows", group.epoch, group.begin)
        buffer.order = skipped + torch.randperm(group.rows, generator=random)
        if damaged:
            buffer.order = self._without(damaged, buffer.order, random)
        return buffer

    def _without(self, damaged: list[tuple[int, int]], order: Tensor, random: torch.Generator) -> Tensor:
        """The same order with other rows instead of the damaged ones.

        Raises:
            DamagedError: all rows of the group are damaged.
        """
        damaged_rows = torch.zeros(len(order) + 2 * self.store.block_rows, dtype=torch.bool)
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
        buffer = Buffer(self.store.block_rows, self.store)
        for chunk, rows in enumerate(self.store.chunks["held_out"]):
            for begin in range(0, rows, self.store.block_rows):
                into = buffer.rows.rows(slice(0, min(self.store.block_rows, rows - begin)))
                self.store.read("held_out", chunk, begin, into)
                yield into
