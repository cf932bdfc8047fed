"""The stream of activations: the model reads a block of tokens, the block is shuffled and handed out batch by batch.

Forward passes form one endless sequence that depends on the text, the settings and the seed only, so their rows do
too. Block n takes the next `buffer_tokens` rows per data rank; the rank's own rows are one stretch of it, and only the
passes that touch the stretch are run. So a position is a forward pass, a number of rows to leave out of it, and how
much of the block was handed out: the same on every rank, and small. To resume, the block is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Batch, Refused
from clt_stream.contexts import Cursor, Packer
from clt_stream.language import StreamLanguageModel
from clt_stream.model import load_model, usable_device
from clt_stream.reader import Reader, Rows, packs
from clt_stream.sites import find_sites
from clt_stream.text.documents import generator, open_texts, part

if TYPE_CHECKING:
    from clt_plugins import Context
    from clt_stream import StreamConfig

log = logging.getLogger(__name__)


@attrs.frozen
class Start:
    """Where a block begins: at a forward pass, of whose rows the first `skip` belong to the block before."""

    cursor: Cursor
    skip: int


class Stream:
    """An `interfaces.Source` of a language model's activations.

    Raises:
        ValueError: the model, its sites or the text are not to be had, or there is less text than a batch.
    """

    def __init__(self, config: StreamConfig, context: Context):
        settings = context.recipe.model if context.recipe is not None else None
        if settings is None:
            raise Refused("model", 'required, but missing: the source "stream" reads a language model')
        parallel = context.parallel
        self.config, self.seed = config, context.seed
        self.rank, self.ranks = parallel.data_rank, parallel.data_ranks
        if context.batch_tokens % self.ranks:
            raise Refused(
                "train.batch_tokens", f"{context.batch_tokens} cannot be divided among {self.ranks} data ranks"
            )
        self.batch_tokens = context.batch_tokens // self.ranks
        if config.buffer_tokens < self.batch_tokens:
            raise Refused(
                "source.buffer_tokens", f"{config.buffer_tokens} is less than a batch of {self.batch_tokens} tokens"
            )
        self.size = config.buffer_tokens // self.batch_tokens * self.batch_tokens
        """Rows of a block on this rank: whole batches."""

        device = torch.device("cpu") if context.device.type == "meta" else context.device
        self.model, self.tokenizer = load_model(settings, device)
        _check_length(self.model, config)
        self.places = find_sites(self.model, settings.inputs, settings.outputs, settings.layers)
        self.sites = [(str(read), str(written)) for read, written in self.places]
        """Where inputs and targets are read, layer by layer."""
        self.reader = Reader(self.model, self.places)
        self.n_layers, self.d_model = self.reader.n_layers, self.reader.d_model
        same = config.buffer_device == "auto"
        self.buffer_device = self.reader.device if same else usable_device(config.buffer_device, "source.buffer_device")
        self.packed = config.pack and packs(self.reader)
        if config.pack and not self.packed:
            log.warning(
                "%s cannot keep packed documents apart: each has a context of its own", type(self.model).__name__
            )

        self.packer = self._packer(held_out=False)
        self._check_amount(context.batch_tokens)
        self.number = self.offset = 0
        self.start = self.following = Start(self.packer.cursor(), 0)
        self.filled = False
        self.block: Rows | None = None
        self.order = torch.empty(0, dtype=torch.int64)
        self.passed = 0
        """Rows of the forward pass read last."""
        self.carried: int | None = None
        """How many of them lie beyond the end of the block, ready for the next one; None if they must be read again."""
        self.evaluation: list[Batch] = []
        self.evaluation_tokens = 0
        """How many were asked for when `evaluation` was read; there may be fewer."""

    # -- the Source protocol ------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next batch; runs the model when a block is used up."""
        if self.filled and self.offset == self.size:
            self.number, self.offset, self.start, self.filled = self.number + 1, 0, self.following, False
        if not self.filled:
            self._fill()
        assert self.block is not None
        index = self.order[self.offset : self.offset + self.batch_tokens]
        self.offset += self.batch_tokens
        return self.block.pick(index)

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """Batches of held-out documents, unshuffled; read at the first call, then kept in memory."""
        if tokens > self.evaluation_tokens:
            self.evaluation, self.evaluation_tokens = self._read_held_out(tokens), tokens
        left = tokens
        for batch in self.evaluation:
            if left <= 0:
                return
            yield batch if batch.tokens <= left else batch.rows(slice(0, left))
            left -= batch.tokens

    def statistics(self) -> Mapping[str, Tensor] | None:
        """None: a stream has no stored statistics."""
        return None

    def language_model(self) -> StreamLanguageModel:
        """The model itself, to be run on the held-out text with its MLPs replaced."""
        return StreamLanguageModel(
            self.model,
            self.places,
            self.d_model,
            lambda contexts: self._packer(held_out=True, contexts=contexts),
            self.tokenizer,
            contexts=self.config.model_batch,
            length=self.config.context,
        )

    def state(self) -> dict[str, Any]:
        """Where the stream stands; the same on every data rank."""
        spent = self.filled and self.offset == self.size
        start = self.following if spent else self.start
        return {
            "ranks": self.ranks,
            "block": self.number + spent,
            "offset": 0 if spent else self.offset,
            "skip": start.skip,
            "cursor": attrs.asdict(start.cursor),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a state; the block it lies in is read again at the next batch.

        How a block is shuffled depends on the number of data ranks: for another number the rest of it is left out.
        """
        self.number, self.offset = state["block"], state["offset"]
        self.start = Start(Cursor(**state["cursor"]), state["skip"])
        self.filled, self.carried = False, None
        if self.offset and state["ranks"] != self.ranks:
            self._leave_block(state["ranks"])

    # -- blocks -------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Read the block that begins at `self.start`: rows `begin` to `end` of it are this rank's."""
        begin, total = self.rank * self.size, self.ranks * self.size
        end = begin + self.size
        if self.block is None:
            # The last pass is read to its end, beyond that of the block.
            self.block = self._rows(self.size + self.config.model_batch * self.config.context)
        cursor = self.start.cursor
        if self.carried is None:
            self.packer.seek(cursor)
            at = -self.start.skip
        else:
            self.block.move(slice(self.size, self.size + self.carried), 0)
            at = self.carried
        while at < total:
            cursor, contexts = self.packer.cursor(), self.packer.next()
            assert contexts is not None, "the trained part of a text never ends"
            first = max(0, begin - at)
            if at < end and first < len(contexts.rows):
                self.reader.read(contexts, contexts.rows[first:], self.block, at + first - begin)
            self.passed = len(contexts.rows)
            at += self.passed
        beyond = at - total
        self.following = Start(cursor, self.passed - beyond) if beyond else Start(self.packer.cursor(), 0)
        self.carried = beyond if self.ranks == 1 else None
        order = torch.randperm(self.size, generator=generator(self.seed, "rows", self.number, self.rank))
        self.order = order.to(self.block.inputs.device)
        self.filled = True

    def _leave_block(self, ranks: int) -> None:
        """Go to the end of a block that so many ranks had begun, without running the model."""
        batch = self.batch_tokens * self.ranks // ranks
        at, total = -self.start.skip, ranks * (self.config.buffer_tokens // batch * batch)
        cursor, rows = self.start.cursor, 0
        self.packer.seek(cursor)
        while at < total:
            cursor, contexts = self.packer.cursor(), self.packer.next()
            assert contexts is not None, "the trained part of a text never ends"
            rows = len(contexts.rows)
            at += rows
        self.start = Start(cursor, rows - (at - total)) if at > total else Start(self.packer.cursor(), 0)
        self.number, self.offset = self.number + 1, 0

    def _read_held_out(self, tokens: int) -> list[Batch]:
        """The first rows of the held-out documents, cut into batches."""
        packer = self._packer(held_out=True)
        rows = self._rows(tokens + self.config.model_batch * self.config.context)
        count = 0
        while count < tokens and (contexts := packer.next()) is not None:
            self.reader.read(contexts, contexts.rows, rows, count)
            count += len(contexts.rows)
        if not count:
            raise self._nothing_held_out()
        count = min(count, tokens)
        # Batches of all ranks together: every rank evaluates the same ones, whatever their number.
        whole = self.batch_tokens * self.ranks
        return [rows.stretch(slice(edge, min(edge + whole, count))) for edge in range(0, count, whole)]

    def _rows(self, count: int) -> Rows:
        return Rows(count, self.n_layers, self.d_model, self.reader.dtype, self.buffer_device)

    def _packer(self, *, held_out: bool, contexts: int | None = None) -> Packer:
        # Held-out documents come in the same order in every run, so that runs of other seeds compare.
        seed = 0 if held_out else self.seed
        texts = open_texts(self.config, seed)
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        config = self.config if contexts is None else attrs.evolve(self.config, model_batch=contexts)
        return Packer(texts, self.tokenizer, config, seed, vocabulary, packed=self.packed, held_out=held_out)

    def _check_amount(self, batch_tokens: int) -> None:
        """Refuse a text with less than a batch in it, or without documents to hold out."""
        rows = self.packer.rows_in_epoch(batch_tokens)
        if not rows:
            raise Refused("source.text", f"{self.config.text!r} holds no text to train on")
        if rows < batch_tokens:
            raise Refused(
                "train.batch_tokens",
                f"a batch of {batch_tokens} tokens is larger than the data: the trained part of "
                f"{self.config.text!r} has {rows}",
            )
        if self.config.held_out:
            texts = open_texts(self.config, 0)
            if next(part(texts, self.config.held_out, held_out=True)) is None:
                raise self._nothing_held_out()

    def _nothing_held_out(self) -> ValueError:
        return ValueError(
            f"source.held_out: no held-out text in {self.config.text!r} at a share of {self.config.held_out:g}: "
            f"raise it, or give more documents (source.sample_by cuts text files into smaller ones)"
        )


def _check_length(model: Any, config: StreamConfig) -> None:
    """Refuse contexts longer than the model was made for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise Refused("source.context", f"{config.context} is longer than the model's {longest} positions")
