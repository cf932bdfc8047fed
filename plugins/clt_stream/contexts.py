"""From documents to context windows: tokenise, cut, pack.

Documents are read in chunks. Each document is cut into pieces of at most one context. The short pieces of a chunk are
packed together, best fit first. Then the chunk's contexts are shuffled, so that neighbours come from different
documents. A document that fits in a context is not cut, and nothing is dropped.

Packed pieces do not see each other. The positions of each piece start at 0, and without an attention mask
`transformers` treats a restart of the positions as the start of another sequence. Padding after the last piece is one
more such sequence.

Shapes: C contexts, T tokens in the longest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from clt_plugins import Refused, generator
from clt_stream.identity import special_tokens
from clt_stream.text.documents import Texts, not_the_same, part
from clt_stream.text.tokens import Tokens

if TYPE_CHECKING:
    from clt_stream import StreamConfig

CHUNK_DOCUMENTS = 64
CHUNK_CHARACTERS = 200_000
"""A chunk has at least this many documents and characters, so that the padding of its last context does not matter."""
CHUNK_LIMIT = 2**25
"""Characters after which a chunk ends, however few documents it has, so that its memory is bounded."""
COUNTED = 1024
"""Contexts whose rows are counted at a time."""


@attrs.frozen(eq=False)
class Contexts:
    """What the model reads in one forward pass, and which positions of it count."""

    ids: Tensor
    """[C, T] int64, padded on the right."""
    position_ids: Tensor
    """[C, T] int64."""
    attention_mask: Tensor | None
    """[C, T] int64, 0 at padding; None where contexts are packed."""
    rows: Tensor
    """The positions that go into batches, as indices into C * T, [R]: no padding, special tokens or first positions."""
    first: int
    """The number of the first context. The others have the next numbers."""
    gapless: bool = False
    """Whether packed pieces follow each other with no position left out between them."""

    def positions(self, rows: Tensor) -> Tensor:
        """(context, position in it) of some rows, [R, 2]. Positions of two packed pieces never follow each other: where
        none was left out between the pieces, one is passed over."""
        length = self.ids.shape[1]
        place = rows % length
        if self.gapless:
            place = place + ((self.position_ids == 0).cumsum(1) - 1).flatten().to(rows.device)[rows]
        return torch.stack([self.first + rows // length, place], 1)


@attrs.frozen
class Cursor:
    """A position between two contexts."""

    mark: dict[str, Any]
    """The position in the text at which the chunk begins."""
    first: int
    """The number of the chunk's first context."""
    done: int
    """How many of the chunk's contexts come before."""


class Packer:
    """Yields contexts: of the trained part of the text, endlessly; or of the held-out part, once.

    Args:
        vocabulary: V, how many tokens the model knows.
        packed: put several short pieces into one context.
    """

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
        self.tokens = Tokens(tokenizer, config.text)
        self.vocabulary, self.held_out = vocabulary, held_out
        self.special = torch.tensor(special_tokens(tokenizer), dtype=torch.int64)
        self.start = array("i", _start(tokenizer, config.bos))
        self.chunk: list[Pieces] = []
        """The contexts of the present chunk, each as its pieces."""
        self.mark: dict[str, Any] = texts.mark()
        self.first = self.done = 0
        self.ended = False
        self.ends = 0
        """Ends of epochs since a row was yielded."""
        self.seek(self.cursor())

    def cursor(self) -> Cursor:
        """The position of the next context."""
        return Cursor(self.mark, self.first, self.done)

    def seek(self, cursor: Cursor) -> None:
        """Go to a cursor; the contexts after it are the same as before.

        Raises:
            Refused: the text has changed.
        """
        if not self.chunk or (cursor.mark, cursor.first) != (self.mark, self.first):
            self.texts.seek(cursor.mark)
            self.documents = part(self.texts, self.config.held_out, held_out=self.held_out)
            self.mark, self.first, self.chunk = cursor.mark, cursor.first, []
            if cursor.done:
                self._read_chunk()
        if not 0 <= cursor.done <= len(self.chunk):
            raise not_the_same(self.config.text)
        self.done, self.ends = cursor.done, 0

    def next(self) -> Contexts | None:
        """The next `model_batch` contexts. The last ones of the held-out part may be fewer; then it returns None.

        Raises:
            Refused: a whole epoch holds nothing to train on.
        """
        chosen: list[Pieces] = []
        number = self.first + self.done
        count, empty_epochs, ends = self.config.model_batch, 0, 0
        while len(chosen) < count:
            if self.done == len(self.chunk):
                if self.held_out and self.ended:
                    break
                self.first, self.done, self.mark = self.first + self.done, 0, self.texts.mark()
                self._read_chunk()
                # The first end may be that of an epoch that had contexts before; the second is that of an empty epoch.
                empty_epochs = 0 if self.chunk else empty_epochs + self.ended
                if empty_epochs > 1:
                    raise self._nothing_to_train_on()
                ends += self.ended
            more = self.chunk[self.done : self.done + count - len(chosen)]
            chosen += more
            self.done += len(more)
        if not chosen:
            return None
        contexts = self._collate(chosen, number)
        # There may be contexts without rows, of special tokens only; whoever waits for rows would wait for ever.
        self.ends = 0 if len(contexts.rows) else self.ends + ends
        if self.ends > 1 and not self.held_out:
            raise self._nothing_to_train_on()
        return contexts

    def rows_in_epoch(self, limit: int) -> int:
        """How many rows an epoch has from here on; counting stops at `limit`."""
        start, rows, chunks = self.cursor(), 0, 0
        while not chunks or (not self.ended and rows < limit):
            self._read_chunk()
            chunks += 1
            for begin in range(0, len(self.chunk), COUNTED):
                if rows >= limit:
                    break
                pieces = [piece for pieces in self.chunk[begin : begin + COUNTED] for piece in pieces]
                rows += int(self._kept(_joined(pieces), _positions([len(piece) for piece in pieces])).sum())
        if chunks > 1:
            self.chunk = []
        self.seek(start)
        return rows

    def _nothing_to_train_on(self) -> Refused:
        return Refused("source.text", f"{self.config.text!r} holds no text to train on")

    def _read_chunk(self) -> None:
        """Set `chunk` to the contexts of the next documents, and `ended` to whether the epoch ends with them."""
        texts: list[str] = []
        characters = 0
        self.ended = False
        while not self.ended and (
            (len(texts) < CHUNK_DOCUMENTS or characters < CHUNK_CHARACTERS) and characters < CHUNK_LIMIT
        ):
            text = next(self.documents)
            if text is None:
                self.ended = True
            else:
                texts.append(text)
                characters += len(text)
        whole: Pieces = []
        short: Pieces = []
        for tokens in self.tokens.of(texts):
            for piece in self._cut(tokens):
                (whole if len(piece) == self.config.context else short).append(piece)
        alone = [[piece] for piece in whole]
        packed = fill(short, self.config.context) if self.packed else [[piece] for piece in short]
        contexts = alone + packed
        order = torch.randperm(len(contexts), generator=generator(self.seed, "contexts", self.first))
        self.chunk = [contexts[number] for number in order.tolist()]

    def _cut(self, tokens: array[int]) -> Iterator[array[int]]:
        """The pieces of one document, without those that are too short to have a row."""
        if max(tokens, default=0) >= self.vocabulary:
            raise Refused(
                "model.tokenizer", f"gives token {max(tokens)}, but the model has {self.vocabulary}: name the right one"
            )
        length = self.config.context - len(self.start)
        for begin in range(0, len(tokens), length):
            piece = self.start + tokens[begin : begin + length]
            if len(piece) > self.config.skip_first:
                yield piece

    def _kept(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Which tokens go into batches, by their id and their position in the piece."""
        return (positions >= self.config.skip_first) & ~torch.isin(ids, self.special)

    def _collate(self, contexts: list[Pieces], first: int) -> Contexts:
        used = [sum(map(len, pieces)) for pieces in contexts]
        length = max(used)
        # One array for all contexts, since a tensor per piece is slow. The padding of each context is a piece of zeros.
        pieces: list[array[int]] = []
        for parts, count in zip(contexts, used, strict=True):
            pieces += [*parts, array("i", bytes(4 * (length - count)))]
        lengths = [len(piece) for piece in pieces]
        ids = _joined(pieces).view(-1, length)
        positions = _positions(lengths).view(-1, length)
        filled = torch.arange(length) < torch.tensor(used)[:, None]
        kept = self._kept(ids, positions) & filled
        mask = None if self.packed else filled.long()
        whole = self.packed and self.config.skip_first == 0
        return Contexts(ids, positions, mask, kept.flatten().nonzero().squeeze(1), first, whole)


def _joined(pieces: list[array[int]]) -> Tensor:
    """The tokens of all pieces, one piece after the other, int64."""
    tokens = array("i")
    for piece in pieces:
        tokens += piece
    return torch.from_numpy(np.frombuffer(tokens, np.int32).astype(np.int64)) if tokens else torch.empty(0).long()


def _positions(lengths: list[int]) -> Tensor:
    """0, 1, 2, ... for each piece, one piece after the other."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    begins = counts.cumsum(0) - counts
    return torch.arange(sum(lengths)) - begins.repeat_interleave(counts)


Pieces: TypeAlias = "list[array[int]]"
"""The token ids of one context: of one piece of a document, or of several."""


def fill(pieces: Pieces, size: int) -> list[Pieces]:
    """Pack pieces into contexts of `size` tokens: the longest first, each where it leaves the fewest tokens free."""
    contexts: list[Pieces] = []
    free: list[tuple[int, int]] = []  # (free tokens, index of the context), ascending
    for piece in sorted(pieces, key=len, reverse=True):
        fit = bisect_left(free, (len(piece), -1))
        if fit == len(free):
            left, index = size, len(contexts)
            contexts.append([])
        else:
            left, index = free.pop(fit)
        contexts[index].append(piece)
        insort(free, (left - len(piece), index))
    return contexts


def _start(tokenizer: Any, choice: str) -> list[int]:
    """The tokens that each piece begins with."""
    bos = tokenizer.bos_token_id
    if choice == "never" or (choice == "auto" and (bos is None or tokenizer("a")["input_ids"][:1] != [bos])):
        return []
    if bos is None:
        raise Refused("source.bos", 'the tokenizer has no beginning-of-sequence token: use "never"')
    return [bos]
