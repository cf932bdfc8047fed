"""A source of stored rows: blocks from all over the store are read into a buffer, shuffled there, and handed out.

While one group of rows is handed out, the next is read by threads; two groups and a few batches are all the memory that
is used. The position is the number of rows handed out: `shuffle` finds group and offset from it.

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
    """An `interfaces.Source` over a `Store`: every row of an epoch once, over all data ranks; epochs follow each other.

    Args:
        buffer_tokens: R, the rows that are shuffled together, on each rank.
        on_corrupt: "stop" raises what `Store.read` raised; "skip" warns, and hands out other rows of the same group in
            place of the damaged ones.

    Raises:
        ValueError: the batch is larger than the data or the buffer, or nothing is held out.
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
        """Rows handed out on this rank."""
        group = min(buffer_tokens, -(-self.deal.group // ranks))
        self.buffers = [Buffer(group + 2 * store.block_rows, store) for _ in range(2)]
        self.shelf = Shelf(pinned=context.device.type == "cuda")
        self.readers = ThreadPoolExecutor(READERS, "clt-read")
        self.loader = ThreadPoolExecutor(1, "clt-load")
        self.maker = ThreadPoolExecutor(1, "clt-batch")
        self.made: deque[Future[Batch]] = deque()
        """Batches that were asked for ahead."""
        self.groups: dict[int, tuple[Group, Future[Buffer]]] = {}
        """By their start: the group in use, and the next."""

    # -- the Source protocol ------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next batch, in the store's type."""
        while len(self.made) < 1 + AHEAD:
            begin = self.position + len(self.made) * self.batch_tokens
            self.made.append(self.maker.submit(self._make, begin))
        batch = self.made.popleft().result()
        self.position += self.batch_tokens
        return batch

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """The first rows of the held-out part, in their stored order."""
        blocks = self._held_out_rows()
        left = min(tokens, sum(self.store.chunks["held_out"]))
        block = None
        while left > 0:
            out = empty(min(self.batch_tokens, left), self.store, torch.empty)
            at = 0
            while at < out.tokens:
                block = block if block is not None and block.tokens else next(blocks)
                count = min(out.tokens - at, block.tokens)
                for source, target in zip(tensors(block), tensors(out), strict=True):
                    target[at : at + count] = source[:count]
                block, at = block.rows(slice(count, None)), at + count
            left -= out.tokens
            yield out

    def statistics(self) -> Mapping[str, Tensor] | None:
        """Those stored beside the data."""
        return self.store.statistics()

    def state(self) -> dict[str, Any]:
        """Where the stream stands; the same on every data rank."""
        return {"rows": self.position, "data": self.store.identity}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a state; its group is read at the next batch.

        Raises:
            ValueError: the state is of other data.
        """
        if state["data"] != self.store.identity:
            raise Refused(self.store.name, "not the data that the state was saved with")
        self._drop()
        self.position = state["rows"]

    def close(self) -> None:
        """Stop the threads; close the store; let go of all memory but that of batches that somebody holds."""
        for each in (self.maker, self.loader, self.readers):
            each.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        for each in (self.maker, self.loader, self.readers):
            each.shutdown(wait=True)
        # A closed source may stay referenced for long, and by cycles through threads that only the collector finds.
        self.made.clear()
        self.groups.clear()
        self.buffers.clear()
        self.shelf.close()

    # -- batches ------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Forget what was made or read ahead."""
        for future in self.made:
            future.cancel()
        # The last task of each thread, so that nothing writes into the buffers any more.
        self.maker.submit(int).result()
        self.loader.submit(int).result()
        self.made.clear()
        self.groups.clear()

    def _make(self, position: int) -> Batch:
        """The batch that begins after `position` rows; in the maker's thread."""
        out = empty(self.batch_tokens, self.store, self.shelf.take)
        at = 0
        while at < self.batch_tokens:
            group, buffer = self._group(position + at)
            offset = position + at - group.start
            count = min(self.batch_tokens - at, group.rows - offset)
            index = buffer.order[offset : offset + count]
            for source, target in zip(tensors(buffer.rows), tensors(out), strict=True):
                torch.index_select(source, 0, index, out=target[at : at + count])
            at += count
        return out

    def _group(self, position: int) -> tuple[Group, Buffer]:
        """The group of a row and its buffer; starts to read the group after it."""
        group = self.deal.at(position)
        # This thread is done with the groups before, so their buffer is free.
        self.groups = {start: held for start, held in self.groups.items() if start >= group.start}
        for wanted in (group, self.deal.at(group.start + group.rows)):
            if wanted.start not in self.groups:
                self.groups[wanted.start] = wanted, self.loader.submit(self._load, wanted, self.buffers[0])
                self.buffers.reverse()
        return group, self.groups[group.start][1].result()

    def _load(self, group: Group, buffer: Buffer) -> Buffer:
        """Read a group's blocks into a buffer and draw the order of its rows; in the loader's thread."""
        if group.epoch != self.epoch:
            self.epoch = group.epoch
            self.order = Order(self.store.chunks["train"], self.store.block_rows, self.seed, "blocks", group.epoch)
        place = self.order.place(group.begin)
        skipped = group.begin - self.order.before(place)
        at, readings = 0, []
        while at < skipped + group.rows:
            chunk, begin, rows = self.order.block(place)
            into = buffer.rows.rows(slice(at, at + rows))
            readings.append((at, rows, self.readers.submit(self.store.read, "train", chunk, begin, into)))
            at, place = at + rows, place + 1
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
        """The same order with other rows in place of damaged ones.

        Raises:
            DamagedError: no row of the group is whole.
        """
        bad = torch.zeros(len(order) + 2 * self.store.block_rows, dtype=torch.bool)
        for first, rows in damaged:
            bad[first : first + rows] = True
        lost = bad[order]
        good = order[~lost]
        if not len(good):
            raise DamagedError(f"{self.store.name}: none of the {len(order)} rows to be shuffled together is whole")
        order = order.clone()
        order[lost] = good[torch.randint(len(good), (int(lost.sum()),), generator=random)]
        return order

    def _held_out_rows(self) -> Iterator[Batch]:
        """The held-out blocks, one after the other."""
        room = Buffer(self.store.block_rows, self.store)
        for chunk, rows in enumerate(self.store.chunks["held_out"]):
            for begin in range(0, rows, self.store.block_rows):
                into = room.rows.rows(slice(0, min(self.store.block_rows, rows - begin)))
                self.store.read("held_out", chunk, begin, into)
                yield into
