"""Activations of held-out documents, batch by batch: kept in memory where training scores on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from clt_plugins import Batch
from clt_stream.contexts import Packer
from clt_stream.finite import check_rows
from clt_stream.reader import Reader
from clt_stream.rows import Rows
from clt_stream.text.documents import nothing_held_out

if TYPE_CHECKING:
    from clt_stream import StreamConfig

KEPT = 2**30
"""Bytes of held-out activations that are kept in memory whatever reads them, so that the model runs once."""


class HeldOutRows:
    """Batches of held-out documents, unshuffled.

    Args:
        packer: contexts of the held-out documents, from the first one on.
        rows: memory for so many rows; the setting that a message names if there is none.
        batch: tokens of a training batch of all ranks: held-out batches are as large, and so the same for any number
            of ranks.
        kept: tokens that training scores on.
    """

    def __init__(
        self,
        config: StreamConfig,
        reader: Reader,
        packer: Callable[[], Packer],
        rows: Callable[[int, str], Rows],
        *,
        batch: int,
        kept: int,
    ):
        self.config, self.reader, self.packer, self.rows, self.batch = config, reader, packer, rows, batch
        self.past = config.model_batch * config.context
        """Rows that the last pass may give more than were asked for."""
        row = 2 * reader.n_layers * reader.d_model * reader.dtype.itemsize
        self.most = max(kept, KEPT // row)
        """Tokens that are kept in memory."""
        self.kept: list[Batch] = []
        self.kept_tokens = 0
        """How many tokens `kept` was read for; it has fewer where the held-out text has."""

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The first tokens, or all that there are.

        What training scores on is read at the first call, and kept in memory, and so is what takes no more than `KEPT`.
        More is read as it is asked for, at each call.

        Raises:
            Refused: no document is held out; or an activation is not finite.
        """
        if tokens > max(self.kept_tokens, self.most):
            yield from self._stream(tokens)
            return
        if tokens > self.kept_tokens:
            self.kept, self.kept_tokens = [], 0  # released before more are read
            self.kept, self.kept_tokens = self._read(tokens), tokens
        left = tokens
        for batch in self.kept:
            if left <= 0:
                return
            yield batch if batch.tokens <= left else batch.rows(slice(0, left))
            left -= batch.tokens

    def _read(self, tokens: int) -> list[Batch]:
        """The first rows, cut into batches."""
        packer = self.packer()
        rows = self.rows(tokens + self.past, "train.eval_tokens")
        count = 0
        while count < tokens and (contexts := packer.next()) is not None:
            self.reader.read(contexts, contexts.rows, rows, count)
            count += len(contexts.rows)
        if not count:
            raise nothing_held_out(self.config.text, self.config.held_out)
        count = min(count, tokens)
        check_rows(rows.view(slice(0, count)), self.reader.layers)
        return [rows.view(slice(begin, min(begin + self.batch, count))) for begin in range(0, count, self.batch)]

    def _stream(self, tokens: int) -> Iterator[Batch]:
        """The same batches as those of `_read`, one at a time."""
        packer = self.packer()
        rows = self.rows(self.batch + self.past, "train.batch_tokens")
        left, count, read = tokens, 0, 0
        while left > 0:
            while count < min(self.batch, left) and (contexts := packer.next()) is not None:
                self.reader.read(contexts, contexts.rows, rows, count)
                check_rows(rows.view(slice(count, count + len(contexts.rows))), self.reader.layers)
                count += len(contexts.rows)
                read += len(contexts.rows)
            if not read:
                raise nothing_held_out(self.config.text, self.config.held_out)
            used = min(self.batch, count, left)
            if not used:
                return
            yield rows.view(slice(0, used)).rows(torch.arange(used))  # a copy: its memory is written again
            rows.take(rows, slice(used, count), 0)
            count, left = count - used, left - used
