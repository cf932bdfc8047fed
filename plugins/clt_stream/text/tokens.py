"""Documents to token ids, in bounded memory.

A tokenizer takes about a hundred bytes for each byte of a text, so it is never handed much at a time. A long document
is read in windows that overlap. Two neighbouring windows are joined in the middle of a run of tokens that both of them
have, at the same characters: what a window's edge changes does not reach that far.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from clt_plugins import Refused

BATCH = 2**20
"""Characters that are tokenised at a time."""
WINDOW = 2**19
"""Characters of a window. Documents of up to `BATCH` characters need none."""
OVERLAPS = (2**12, 2**15, 2**18)
"""Characters that two windows share: more where no seam is found in fewer."""
AGREED = 32
"""Tokens on either side of a seam that both windows must have."""

Token = tuple[int, tuple[int, int]]
"""Its id, and the characters of the document that it stands for."""


class Tokens:
    """Tokenises documents, without special tokens.

    Args:
        name: the text, for messages.
    """

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)

    def of(self, texts: Iterable[str]) -> Iterator[array[int]]:
        """The ids of each text, int32.

        Raises:
            Refused: a long text cannot be tokenised in windows, since the tokens depend on all of it.
        """
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and size + len(text) > BATCH:
                yield from self._batch(batch)
                batch, size = [], 0
            if len(text) > BATCH and self.backend is not None:
                yield self._long(text)
            else:
                batch.append(text)
                size += len(text)
        if batch:
            yield from self._batch(batch)

    def _batch(self, texts: list[str]) -> Iterator[array[int]]:
        if self.backend is None:
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                yield array("i", ids)
            return
        # The same ids as above, without the masks and offsets, which take a quarter of the time.
        self._all_of_it()
        for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False):
            yield array("i", encoded.ids)

    def _long(self, text: str) -> array[int]:
        self._all_of_it()
        ids = array("i")
        begin, window = 0, self._window(text, 0)
        while begin + WINDOW < len(text):
            for overlap in OVERLAPS:
                start = begin + WINDOW - overlap
                following = self._window(text, start)
                if (seam := _seam(window, following, start, begin + WINDOW)) is not None:
                    break
            else:
                raise Refused(
                    "source.text",
                    f"a document of {len(text)} characters in {self.name!r} is too long: its tokens cannot be found "
                    f"part by part near character {begin + WINDOW}; cut it, or set source.sample_by",
                )
            ids.extend(token for token, _ in window[: seam[0]])
            begin, window = start, following[seam[1] :]
        ids.extend(token for token, _ in window)
        return ids

    def _window(self, text: str, begin: int) -> list[Token]:
        encoded = self.backend.encode(text[begin : begin + WINDOW], add_special_tokens=False)
        spans = ((first + begin, last + begin) for first, last in encoded.offsets)
        return list(zip(encoded.ids, spans, strict=True))

    def _all_of_it(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()


def _seam(before: Sequence[Token], after: Sequence[Token], begin: int, end: int) -> tuple[int, int] | None:
    """Where two windows can be joined: the numbers of the same token in both; None if they agree nowhere.

    Args:
        begin: the characters that both have, up to `end`.
    """
    middle = (begin + end) // 2
    numbers: dict[Token, int] = {}
    for number, token in enumerate(after):
        if token[1][0] >= end:
            break
        numbers.setdefault(token, number)
    # From the middle of the overlap outwards, since the edges are where the windows differ.
    shared = [number for number in range(len(before) - 1, -1, -1) if before[number][1][0] >= begin]
    for left in sorted(shared, key=lambda number: abs(before[number][1][0] - middle)):
        right = numbers.get(before[left])
        if right is None or min(left, right) < AGREED or min(len(before) - left, len(after) - right) < AGREED:
            continue
        if before[left - AGREED : left + AGREED] == after[right - AGREED : right + AGREED]:
            return left, right
    return None
