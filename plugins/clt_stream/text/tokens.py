"""Documents to token ids, in bounded memory.

A tokenizer takes about a hundred bytes for each byte of a text, so it is never handed much at a time. A long document
is read in windows that overlap. Two neighbouring windows are joined in the middle of a run of tokens that both of them
have, at the same characters: what a window's edge changes does not reach that far. (A unigram tokenizer that finds
several equally probable tokens for a word without end, such as a long line of dashes, may choose others of these.)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
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
        window, first = self._window(text, 0), 0
        while window.end < len(text):
            for overlap in OVERLAPS:
                following = self._window(text, window.end - overlap)
                if (seam := _seam(window, following)) is not None:
                    break
            else:
                raise Refused(
                    "source.text",
                    f"a document of {len(text)} characters in {self.name!r} is too long: its tokens cannot be found "
                    f"part by part near character {window.end}; cut it, or set source.sample_by",
                )
            ids += window.ids[first : seam[0]]
            window, first = following, seam[1]
        return ids + window.ids[first:]

    def _window(self, text: str, begin: int) -> _Window:
        part = text[begin : begin + WINDOW]
        return _Window(begin, begin + len(part), self.backend.encode(part, add_special_tokens=False))

    def _all_of_it(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()


class _Window:
    """The tokens of a part of a document, its characters from `begin` up to `end`."""

    def __init__(self, begin: int, end: int, encoded: Any):
        self.begin, self.end, self.encoded = begin, end, encoded
        self.ids = array("i", encoded.ids)

    def token(self, number: int) -> Token:
        first, last = self.encoded.token_to_chars(number)
        return self.ids[number], first + self.begin, last + self.begin


Token = tuple[int, int, int]
"""Its id, and the characters of the document that it stands for: from the first up to the last."""


def _seam(before: _Window, after: _Window) -> tuple[int, int] | None:
    """Where two windows can be joined: the number of the same token in both; None if they agree nowhere."""
    # Token by token from the edges, since the spans of all tokens take as long as the tokens.
    last: list[Token] = []
    for number in range(len(before.ids) - 1, -1, -1):
        token = before.token(number)
        if token[1] < after.begin:
            break
        last.append(token)
    last.reverse()
    first: list[Token] = []
    numbers: dict[Token, int] = {}
    for number in range(len(after.ids)):
        token = after.token(number)
        if token[1] >= before.end:
            break
        numbers.setdefault(token, number)
        first.append(token)
    # From the middle of the overlap outwards, since the edges are where the windows differ.
    middle = (after.begin + before.end) // 2
    for left in sorted(range(AGREED, len(last) - AGREED), key=lambda number: abs(last[number][1] - middle)):
        right = numbers.get(last[left], -1)
        if right >= AGREED and last[left - AGREED : left + AGREED] == first[right - AGREED : right + AGREED]:
            return len(before.ids) - len(last) + left, right
    return None
