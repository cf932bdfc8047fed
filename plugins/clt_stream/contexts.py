"""From documents to context windows: tokenise, cut, pack.

Documents come in chunks. Each document is cut into pieces of at most one context; the short pieces of a chunk are
packed together, best fit first, and the chunk's contexts are then shuffled, so that neighbours come from different
documents. Nothing is cut that fits in a context, and nothing is dropped.

Packed pieces do not see each other: each one's positions start at 0, and without an attention mask `transformers` reads
a restart of the positions as the start of another sequence. Padding after the last piece is one more such sequence.

Shapes: C contexts, T tokens in the longest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from clt_plugins import Refused
from clt_stream.text.documents import Texts, generator, part

if TYPE_CHECKING:
    from clt_stream import StreamConfig

CHUNK_DOCUMENTS = 64
CHUNK_CHARACTERS = 200_000
"""A chunk has at least this many documents and characters, so that padding its last context costs next to nothing."""


@attrs.frozen(eq=False)
class Contexts:
    """What the model reads in one forward pass, and which rows of it count."""

    ids: Tensor
    """[C, T] int64, padded on the right."""
    position_ids: Tensor
    """[C, T] int64."""
    attention_mask: Tensor | None
    """[C, T] int64, 0 at padding; None where contexts are packed."""
    rows: Tensor
    """Positions that go into batches, as indices into C * T, [R]: no padding, special tokens or first positions."""
    first: int
    """The number of the first context; the others follow."""

    def places(self, rows: Tensor) -> Tensor:
        """(context, position in it) of some rows, [R, 2]."""
        length = self.ids.shape[1]
        return torch.stack([self.first + rows // length, rows % length], 1)


@attrs.frozen
class Cursor:
    """A place between two contexts."""

    mark: dict[str, Any]
    """Where the chunk begins in the text."""
    first: int
    """The number of the chunk's first context."""
    done: int
    """How many of the chunk's contexts were handed out."""


class Packer:
    """Contexts of the trained part of the text, endlessly; or of the held-out part, once."""

    def __init__(
        self,
        texts: Texts,
        tokenizer: Any,
        config: StreamConfig,
        seed: int,
        vocabulary: int,
        *,
        packed: bool,
        held_out: bool = False,
    ):
        self.texts, self.tokenizer, self.config, self.seed, self.packed = texts, tokenizer, config, seed, packed
        self.vocabulary, self.held_out = vocabulary, held_out
        self.special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
        self.start = _start(tokenizer, config.bos)
        self.chunk: list[Pieces] = []
        """The contexts at hand."""
        self.mark: dict[str, Any] = texts.mark()
        self.first = self.done = 0
        self.ended = False
        self.seek(self.cursor())

    def cursor(self) -> Cursor:
        """Where the next context stands."""
        return Cursor(self.mark, self.first, self.done)

    def seek(self, cursor: Cursor) -> None:
        """Go to a cursor: the contexts that follow are those that followed it before.

        Raises:
            ValueError: the text is another one.
        """
        if self.chunk and (cursor.mark, cursor.first) == (self.mark, self.first):
            self.done = cursor.done
            return
        self.texts.seek(cursor.mark)
        self.documents = part(self.texts, self.config.held_out, held_out=self.held_out)
        self.mark, self.first, self.done = cursor.mark, cursor.first, 0
        self.chunk = []
        if cursor.done:
            self._read_chunk()
            self.done = cursor.done
            if cursor.done > len(self.chunk):
                raise Refused("source.text", f"{self.config.text!r} is not what it was when the state was saved")

    def next(self) -> Contexts | None:
        """The next `model_batch` contexts; of the held-out part also fewer, and None at its end.

        Raises:
            ValueError: a whole epoch holds nothing to train on.
        """
        chosen: list[Pieces] = []
        number = self.first + self.done
        wanted, barren_epochs = self.config.model_batch, 0
        while len(chosen) < wanted:
            if self.done == len(self.chunk):
                if self.held_out and self.ended:
                    break
                self.first, self.done, self.mark = self.first + self.done, 0, self.texts.mark()
                self._read_chunk()
                # One end may close an epoch that was read up to here; a second one closes an empty epoch.
                barren_epochs = 0 if self.chunk else barren_epochs + self.ended
                if barren_epochs > 1:
                    raise Refused("source.text", f"{self.config.text!r} holds no text to train on")
            taken = self.chunk[self.done : self.done + wanted - len(chosen)]
            chosen += taken
            self.done += len(taken)
        return self._collate(chosen, number) if chosen else None

    def rows_in_epoch(self, limit: int) -> int:
        """How many rows the first epoch gives, counted until they are `limit`."""
        here, rows, chunks = self.cursor(), 0, 0
        while not chunks or (not self.ended and rows < limit):
            self._read_chunk()
            chunks += 1
            pieces = [piece for pieces in self.chunk for piece in pieces]
            tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
            rows += int(self._kept(tokens, _places([len(piece) for piece in pieces])).sum())
        if chunks > 1:
            self.chunk = []
        self.seek(here)
        return rows

    def _read_chunk(self) -> None:
        """Set `chunk` to the contexts of the next documents, and `ended` to whether they are the epoch's last."""
        texts: list[str] = []
        characters = 0
        self.ended = False
        while not self.ended and (len(texts) < CHUNK_DOCUMENTS or characters < CHUNK_CHARACTERS):
            text = next(self.documents)
            if text is None:
                self.ended = True
            else:
                texts.append(text)
                characters += len(text)
        whole: Pieces = []
        short: Pieces = []
        for tokens in self._tokenise(texts):
            for piece in self._cut(tokens):
                (whole if len(piece) == self.config.context else short).append(piece)
        alone = [[piece] for piece in whole]
        packed = fill(short, self.config.context) if self.packed else [[piece] for piece in short]
        contexts = alone + packed
        order = torch.randperm(len(contexts), generator=generator(self.seed, "contexts", self.first))
        self.chunk = [contexts[place] for place in order.tolist()]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # The same ids, without the masks and offsets that take a quarter of the time.
        backend.no_truncation()
        backend.no_padding()
        return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _cut(self, tokens: list[int]) -> Iterator[list[int]]:
        """The pieces of one document; without those too short to have a row."""
        if max(tokens, default=0) >= self.vocabulary:
            raise Refused(
                "model.tokenizer", f"gives token {max(tokens)}, but the model has {self.vocabulary}: name the right one"
            )
        room = self.config.context - len(self.start)
        for begin in range(0, len(tokens), room):
            piece = self.start + tokens[begin : begin + room]
            if len(piece) > self.config.skip_first:
                yield piece

    def _kept(self, ids: Tensor, places: Tensor) -> Tensor:
        """Which positions go into batches, by their token and their place in its piece."""
        return (places >= self.config.skip_first) & ~torch.isin(ids, self.special)

    def _collate(self, contexts: list[Pieces], first: int) -> Contexts:
        used = [sum(map(len, pieces)) for pieces in contexts]
        length = max(used)
        # One stretch of numbers for all contexts: what is left of each is one more piece, of zeros.
        tokens: list[int] = []
        lengths: list[int] = []
        for pieces, count in zip(contexts, used, strict=True):
            for piece in pieces:
                tokens += piece
                lengths.append(len(piece))
            tokens += [0] * (length - count)
            lengths.append(length - count)
        # NumPy reads a list in a quarter of the time that torch takes.
        ids = torch.from_numpy(np.array(tokens, dtype=np.int64)).view(-1, length)
        places = _places(lengths).view(-1, length)
        filled = torch.arange(length) < torch.tensor(used)[:, None]
        kept = self._kept(ids, places) & filled
        mask = None if self.packed else filled.long()
        return Contexts(ids, places, mask, kept.flatten().nonzero().squeeze(1), first)


def _places(lengths: list[int]) -> Tensor:
    """0, 1, 2, ... for each piece of the given lengths, one after the other."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    begins = counts.cumsum(0) - counts
    return torch.arange(sum(lengths)) - begins.repeat_interleave(counts)


Pieces = list[list[int]]
"""The token ids of one context: of one piece of a document, or of several."""


def fill(pieces: Pieces, size: int) -> list[Pieces]:
    """Pack pieces into contexts of `size` tokens: the longest first, each where it leaves the least room."""
    contexts: list[Pieces] = []
    room: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect_left(room, (len(piece), -1))
        if at == len(room):
            left, index = size, len(contexts)
            contexts.append([])
        else:
            left, index = room.pop(at)
        contexts[index].append(piece)
        insort(room, (left - len(piece), index))
    return contexts


def _start(tokenizer: Any, choice: str) -> list[int]:
    """The tokens that each piece begins with."""
    bos = tokenizer.bos_token_id
    if choice == "never" or (choice == "auto" and (bos is None or tokenizer("a")["input_ids"][0] != bos)):
        return []
    if bos is None:
        raise Refused("source.bos", 'the tokenizer has no beginning-of-sequence token: use "never"')
    return [bos]
