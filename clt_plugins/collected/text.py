"""The text of a store: which rows are neighbours, and what its tokens are spelled.

Shapes: T rows, n rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[Any]]


class CollectedText:
    """The rows of a text, sorted by context and position.

    Rows are neighbours where their context is one and the position goes on by 1. Where texts
    share a context, a position is passed over between them.

    Args:
        ids, context, position: of each row, [T].
    """

    def __init__(self, ids: Ints, context: Ints, position: Ints):
        self.ids, self.context, self.position = ids, context, position
        ends = np.ones(len(ids) + 1, bool)
        ends[1:-1] = (context[1:] != context[:-1]) | (position[1:] != position[:-1] + 1)
        self._edges = np.flatnonzero(ends) if len(ids) else np.zeros(1, np.int64)
        """Where stretches of neighbours begin, and T."""
        ends[1:-1] = context[1:] != context[:-1]
        self._contexts = np.flatnonzero(ends) if len(ids) else np.zeros(1, np.int64)

    def around(self, rows: Ints, before: int, after: int) -> tuple[Ints, Ints]:
        """The neighbours of rows [n], the rows themselves among them: where each window starts and stops, [n] int64."""
        start, stop = _between(self._edges, rows)
        return np.maximum(start, rows - before), np.minimum(stop, rows + after + 1)

    def contexts_of(self, rows: Ints) -> tuple[Ints, Ints]:
        """Where the whole context of each row [n] starts and stops, [n] int64: all of its rows that were read."""
        return _between(self._contexts, rows)


def _between(edges: Ints, rows: Ints) -> tuple[Ints, Ints]:
    number = np.searchsorted(edges, rows, side="right")
    return edges[number - 1], edges[number]


class Vocabulary:
    """The bytes of token ids.

    Args:
        token: ids, ascending, [V].
        start: token i has the bytes start[i] : start[i + 1], [V + 1].
        data: all bytes.
    """

    def __init__(self, token: Ints, start: Ints, data: Ints):
        self.token, self._start, self._bytes = token, start, data

    @classmethod
    def of(cls, pieces: Mapping[int, bytes]) -> Vocabulary:
        """From the bytes of each id."""
        ordered = sorted(pieces)
        data = [pieces[one] for one in ordered]
        start = np.cumsum([0, *map(len, data)], dtype=np.int64)
        return cls(np.array(ordered, np.int32), start, np.frombuffer(b"".join(data), np.uint8))

    def arrays(self) -> dict[str, Ints]:
        """As a file holds it."""
        return {"token": self.token, "start": self._start, "bytes": self._bytes}

    def spell(self, ids: Sequence[int] | Ints | Iterable[int]) -> list[bytes]:
        """The bytes of each token.

        Raises:
            KeyError: an id occurs nowhere in the store.
        """
        numbers = np.fromiter(ids, np.int64)
        index = np.searchsorted(self.token, numbers)
        known = index < len(self.token)
        known[known] = self.token[index[known]] == numbers[known]
        if not known.all():
            raise KeyError(int(numbers[~known][0]))
        return [self._bytes[self._start[one] : self._start[one + 1]].tobytes() for one in index.tolist()]


def show(pieces: Iterable[bytes]) -> str:
    """Bytes of neighbouring tokens as text. What is no UTF-8, such as a part of an emoji, is shown as U+FFFD."""
    return b"".join(pieces).decode("utf-8", "replace")
