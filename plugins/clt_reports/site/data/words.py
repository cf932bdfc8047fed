"""The tokens that occur: their bytes, and the texts that they are looked up by.

A word is the number of a token among those that occur, in the order of the tokenizer's ids.
"""

from __future__ import annotations

import numpy as np

from clt_plugins import Refused

IDS = 2**24
"""Token ids that a vocabulary may have."""

KEY_UNITS = 64
"""UTF-16 units of the longest key."""

KEY_BYTES = 4 * KEY_UNITS
"""A key is made from no more bytes of a token: it could not be longer."""

SPELLED = {" ": "\\s", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
"""How white space is written where there is nothing else."""


class Words:
    """The vocabulary of a site.

    Args:
        ids: of the tokens that occur, ascending, [V].
        start: word w has the bytes start[w] : start[w + 1], [V + 1].
        data: the bytes of all, uint8.
    """

    def __init__(self, ids: np.ndarray, start: np.ndarray, data: np.ndarray):
        self.ids, self.start, self.data = np.asarray(ids, dtype=np.int64), np.asarray(start), np.asarray(data)
        if len(ids) and self.ids[-1] >= IDS:
            raise Refused("vocabulary", f"the token id {self.ids[-1]} is larger than those of any tokenizer")
        # The word of each id, and -1 for those below 0, which are looked up from the end. A search would take longer.
        self._word = np.full(int(self.ids[-1]) + 2 if len(ids) else 1, -1, dtype=np.int32)
        self._word[self.ids] = np.arange(len(ids))

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The word of each id; -1 for those below 0 and those that do not occur. Any shape."""
        return self._word[np.clip(ids, -1, len(self._word) - 1)]

    def arrays(self) -> dict[str, np.ndarray]:
        """What `data/vocabulary.js` packs."""
        return {"id": self.ids, "start": self.start, "bytes": self.data}

    def keys(self) -> tuple[list[str], np.ndarray]:
        """The texts that words are found by, in JavaScript's order; and the number of each word's, [V], or -1."""
        bounds = zip(self.start[:-1].tolist(), self.start[1:].tolist(), strict=True)
        of_word = [key(self.data[first : min(stop, first + KEY_BYTES)].tobytes()) for first, stop in bounds]
        ordered = sorted({one for one in of_word if one}, key=units)
        number = {one: n for n, one in enumerate(ordered)}
        return ordered, np.array([number.get(one, -1) for one in of_word], dtype=np.int64)


def units(text: str) -> bytes:
    """What JavaScript compares of a string: UTF-16 units."""
    return text.encode("utf-16-be", "surrogatepass")


def key(spelled: bytes) -> str:
    """The text that a token is looked up by; "" for one without bytes."""
    text = spelled[:KEY_BYTES].decode("utf-8", "backslashreplace")
    bare = text.strip()
    if not bare:
        return _cut("".join(SPELLED.get(one, one) for one in text))
    return _cut(bare.lower())


def _cut(text: str) -> str:
    """The first units of a text; a character of two units is not divided."""
    data = units(text)
    if len(data) <= 2 * KEY_UNITS:
        return text
    return data[: 2 * KEY_UNITS].decode("utf-16-be", "ignore")
