"""The stream of activations: the model reads a block of tokens, the block is shuffled and yielded batch by batch.

Contexts form one endless sequence that depends only on the text, the settings and the seed; so do their rows. They
are dealt to the data ranks in blocks (`Deal`). Each rank needs a part of a block, and runs only the forward passes that
have rows in that part. (It tokenises all of the text, since the contexts before its part must be counted.)

Tensor ranks divide the passes of a block among them (`blocks`).

So the position in the stream is small, and the same on every rank: a context at which to begin, the number of its rows
to leave out, and how many rows were dealt. To resume, the block is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Batch, Deal, Refused, check_data
from clt_stream.blocks import Block, Filling, Start, Turns, plan
from clt_stream.contexts import Cursor, Packer
from clt_stream.held_out import HeldOutRows
from clt_stream.identity import model_identity, text_identity, tokenizer_identity
from clt_stream.language import StreamLanguageModel
from clt_stream.model import load_model, usable_device
from clt_stream.outline import block_rows
from clt_stream.reader import Reader, packs
from clt_stream.rows import Rows, moved
from clt_stream.sites import find_sites
from clt_stream.text import open_texts
from clt_stream.text.documents import check_split
from clt_stream.training import TrainingTexts

if TYPE_CHECKING:
    from clt_plugins import Context, Group
    from clt_stream import StreamConfig
    from clt_stream.contexts import Contexts

log = logging.getLogger(__name__)


class Stream:
    """A `Source`: a language model's activations as it reads text. It also `HasModel`, `TrainsInModel`, is `Identified`
    and `Buffered`.

    Raises:
        Refused: the model, its sites or the text cannot be used, or the text has fewer tokens than a batch.
    """

    def __init__(self, config: StreamConfig, context: Context):
        settings = context.recipe.model if context.recipe is not None else None
        if context.recipe is None or settings is None:
            raise Refused("model", 'required, but missing: the source "stream" reads a language model')
        self.config, self.settings, self.seed = config, settings, context.seed
        self.eval_tokens = context.recipe.train.eval_tokens
        self.rank, self.ranks = context.parallel.data_rank, context.parallel.data_ranks
        self.batch_tokens = context.batch_share()
        size = config.buffer_tokens
        if size < self.batch_tokens:
            raise Refused("source.buffer_tokens", f"{size} is less than a batch of {self.batch_tokens} tokens")
        self.turns = Turns(context.parallel)

        # Before the model, which takes longer to load.
        self.texts = open_texts(config, self.seed)
        check_split(self.texts.again(0), config.held_out, config.text)

        device = torch.device("cpu") if context.device.type == "meta" else context.device
        self.model, self.tokenizer = load_model(settings, device)
        _check_length(self.model, config)
        self._sites = find_sites(self.model, settings.inputs, settings.outputs, settings.layers)
        self.sites = [(str(read), str(written)) for read, written in self._sites]
        """Where inputs and targets are read, layer by layer, as text."""
        self.reader = Reader(self.model, self._sites, settings.layers)
        self.n_layers, self.d_model = self.reader.n_layers, self.reader.d_model
        same = config.buffer_device == "auto"
        self.buffer_device = self.reader.device if same else usable_device(config.buffer_device, "source.buffer_device")
        self.ahead = reads_ahead(self.reader.device, self.buffer_device) and size >= 2 * self.batch_tokens
        """Whether the next block is read while this one is used: on a GPU, in two halves of the buffer."""
        self.size = size // (1 + self.ahead) // self.batch_tokens * self.batch_tokens
        """Rows of a block on this rank: whole batches."""
        self.packed = config.pack and packs(self.reader)
        if config.pack and not self.packed:
            name = type(self.model).__name__
            log.warning("%s cannot keep packed documents apart: each gets a context of its own", name)

        self.packer = self._packer(held_out=False)
        self._check_amount(context.batch_tokens)
        self.deal = Deal(self.seed, self.size * self.ranks, self.rank, self.ranks)
        self.position = 0
        """Rows that were yielded on this rank, since the number of ranks was last changed."""
        self.start = self.following = Start(self.packer.cursor(), 0, 0)
        """Where the block in use and the next one begin."""
        self.block: Block | None = None
        """The block in use; None before the first one, and after a failure."""
        self.rows: Rows | None = None
        """This rank's part of it."""
        self.spare: Rows | None = None
        """Memory for the next block, if it is read ahead."""
        self.next_block: Filling | None = None
        on_gpu = self.reader.device.type == "cuda"
        self.queue = torch.cuda.Stream(self.reader.device) if self.ahead and on_gpu else None
        self.order = torch.empty(0, dtype=torch.int64)
        self._identity: dict[str, str] | None = None
        self._texts: TrainingTexts | None = None
        """Contexts for losses that run the model; made at the first one."""
        self.held_out_rows = HeldOutRows(
            config,
            self.reader,
            lambda: self._packer(held_out=True),
            self._rows,
            batch=self.batch_tokens * self.ranks,
            kept=self.eval_tokens,
        )

    # -- the Source protocol ------------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next batch; runs the model when all of a block was yielded."""
        parts: list[Batch] = []
        missing = self.batch_tokens
        while missing:  # once, unless the rows that other ranks have left end within the batch
            group = self._fill()
            assert self.rows is not None
            offset = self.position - group.start
            index = self.order[offset : offset + missing]
            parts.append(self.rows.pick(index))
            self.position, missing = self.position + len(index), missing - len(index)
        if self.next_block is not None:
            # Evenly over the steps of this block, so that none waits for the model.
            self.next_block.advance(-(-self.next_block.rounds() // max(1, self.size // self.batch_tokens - 1)))
        return parts[0] if len(parts) == 1 else _join(parts)

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """Batches of held-out documents, unshuffled."""
        yield from self.held_out_rows.batches(tokens)

    def statistics(self) -> Mapping[str, Tensor] | None:
        """None: the engine estimates them from the first batches."""
        return None

    def language_model(self) -> StreamLanguageModel:
        """The model on the held-out text, to be run with its MLPs replaced."""
        return StreamLanguageModel(
            self.model,
            self._sites,
            self.d_model,
            lambda contexts: self._packer(held_out=True, contexts=contexts),
            self.tokenizer,
            contexts=self.config.model_batch,
            length=self.config.context,
        )

    def trainable_model(self) -> StreamLanguageModel:
        """The same model, for losses that run it on `training_text`."""
        return self.language_model()

    def training_text(self, contexts: int, position: Any) -> tuple[Contexts, Any]:
        """See `TrainsInModel`: the stream's contexts in order, from the first one on."""
        if self._texts is None or position is None:
            self._texts = TrainingTexts(self._packer(held_out=False, contexts=1), self.rank, self.ranks)
        return self._texts.read(contexts, position)

    def identity(self) -> Mapping[str, str]:
        """See `Identified`: of the text, the tokenizer, the model's weights and the sites; computed once."""
        if self._identity is None:
            self._identity = {
                "source.text": text_identity(self.packer.texts),
                "model.path": model_identity(self.model),
                # Whatever they say: the weights are compared.
                "model.revision": "see model.path",
                "model.gguf_file": "see model.path",
                "model.tokenizer": tokenizer_identity(self.tokenizer),
                "model.inputs": ", ".join(read for read, _ in self.sites),
                "model.outputs": ", ".join(written for _, written in self.sites),
            }
        return self._identity

    def buffer_bytes(self) -> Mapping[str, int]:
        """Blocks, and the held-out rows of an evaluation; each is read to the end of its last forward pass."""
        same = self.config.buffer_device == "auto"
        rows = block_rows(self.config, self.batch_tokens, self.eval_tokens, parts=1 + self.ahead)
        row = 2 * self.n_layers * self.d_model * self.reader.dtype.itemsize
        return {self.settings.device if same else self.config.buffer_device: rows * row}

    def state(self) -> dict[str, Any]:
        """The position in the stream; the same on every data rank."""
        start = self._start_of(self.deal.at(self.position))
        return {
            "data": dict(self.identity()),
            **self.deal.state(self.position),
            "skip": start.skip,
            "cursor": attrs.asdict(start.cursor),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a state. Its block is read again at the next batch.

        Other data ranks may have saved it, more or fewer: what they left of their block is dealt first.

        Raises:
            Refused: text, tokenizer or model are others.
        """
        check_data(state, self.identity())
        self.position = self.deal.load_state(state)
        row = self.deal.at(self.position).begin
        self.start = self.following = Start(Cursor(**state["cursor"]), state["skip"], row)
        self._forget()

    # -- blocks -------------------------------------------------------------------------------------------------

    def _start_of(self, group: Group) -> Start:
        """Where the block of all ranks begins that has a group: that in use, or the one after."""
        start = self.start if group.begin == self.start.row else self.following
        assert group.begin == start.row, "blocks follow each other"
        return start

    def _fill(self) -> Group:
        """Read the group at the position, this rank's part of a block, if it is not the one in use."""
        group = self.deal.at(self.position)
        if self.block is not None and self.block.group.start == group.start:
            return group
        filling, self.next_block = self.next_block, None
        if filling is None:
            filling = self._begin(group)
        self.block = None
        with self.turns.all_or_none():
            filling.finish()
        filling.check()
        self.rows, self.spare = filling.into, self.rows if self.ahead else None
        self.block = block = filling.block
        self.start, self.following = block.start, block.following
        self.order = moved(group.order(self.seed), self.rows.inputs.device)
        if self.ahead:
            self.next_block = self._begin(self.deal.at(group.start + group.count))
        return group

    def _begin(self, group: Group) -> Filling:
        """Begin to read a group into the memory that is free: which passes it needs is known afterwards."""
        start, before = self._start_of(group), self.block
        if before is not None and before.following.row != group.begin:
            before = None
        self.block = self.block if self.ahead else None  # its memory is written from here on
        with self.turns.all_or_none():
            into = self.spare if self.ahead else self.rows
            if into is None:
                # The last pass is read to its end, which may be after that of the block.
                into = self._rows(self.size + self.config.model_batch * self.config.context, "source.buffer_tokens")
            block = plan(self.packer, group, start, before, alone=self.ranks == 1)
        filling = Filling(block, self.reader, into, self.turns, self.queue)
        if before is not None and before.carried:
            assert self.rows is not None
            filling.carry_over(self.rows, self.size, before.carried)
        return filling

    def _forget(self) -> None:
        """Blocks that are in memory."""
        if self.next_block is not None:
            self.next_block.drop()
        self.block = self.next_block = None

    def _rows(self, count: int, setting: str) -> Rows:
        return Rows(count, self.n_layers, self.d_model, self.reader.dtype, self.buffer_device, setting)

    def _packer(self, *, held_out: bool, contexts: int | None = None) -> Packer:
        # Held-out documents are in the same order in every run, so that runs with different seeds can be compared.
        seed = 0 if held_out else self.seed
        texts = self.texts.again(seed)
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        config = self.config if contexts is None else attrs.evolve(self.config, model_batch=contexts)
        return Packer(texts, self.tokenizer, config, seed, vocabulary, packed=self.packed, held_out=held_out)

    def _check_amount(self, batch_tokens: int) -> None:
        """Refuse a text with fewer tokens than a batch."""
        rows = self.packer.rows_in_epoch(batch_tokens)
        if not rows:
            raise Refused("source.text", f"{self.config.text!r} holds no text to train on: its documents are too short")
        if rows < batch_tokens:
            raise Refused(
                "train.batch_tokens",
                f"a batch of {batch_tokens} tokens is larger than the data: the trained part of "
                f"{self.config.text!r} has {rows}",
            )


def reads_ahead(model: torch.device, buffer: torch.device) -> bool:
    """Whether the model can read the next block while this one is trained on: a GPU does two things at a time."""
    return model.type == buffer.type == "cuda"


def _join(parts: list[Batch]) -> Batch:
    """Batches one after the other."""
    names = ("inputs", "targets", "token_ids", "positions")
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _check_length(model: Any, config: StreamConfig) -> None:
    """Refuse contexts that are longer than the model can read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise Refused("source.context", f"{config.context} is longer than the model's {longest} positions")
