"""The order in which documents are read, and their split into a trained and a held-out part.

Every kind of text knows its position as a small `mark`, and can go back to it exactly.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from clt_plugins import Refused, generator
from clt_stream.library_errors import one_line
from clt_stream.text.stdlib import is_held_out

READ_AHEAD = 64
"""Documents that are fetched from a stored data set at a time."""


class Texts(Protocol):
    """Documents, epoch after epoch."""

    def identity(self) -> str:
        """A digest of the content, and how much it is; the same wherever the text lies and whatever it is called."""

    def mark(self) -> dict[str, Any]:
        """The position of the next document, as JSON."""

    def seek(self, mark: dict[str, Any]) -> None:
        """Go to a mark."""

    def next(self) -> tuple[str, str] | None:
        """The next document as (identity, text); None at the end of an epoch, and then the next epoch's first."""


class StoredTexts:
    """Documents that can be reached by number: each epoch has an order of its own, drawn from (seed, epoch).

    Args:
        fetch: gives the documents of some numbers below `count`, as (identity, text).
        content: what `identity` returns.
    """

    def __init__(self, count: int, fetch: Callable[[Sequence[int]], list[tuple[str, str]]], seed: int, content: str):
        self.count, self.fetch, self.seed, self.content = count, fetch, seed, content
        self.epoch = self.index = 0
        self.ahead: list[tuple[str, str]] = []
        self._shuffle()

    def identity(self) -> str:
        return self.content

    def mark(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def seek(self, mark: dict[str, Any]) -> None:
        self.epoch, self.index = mark["epoch"], mark["index"]
        self._shuffle()

    def next(self) -> tuple[str, str] | None:
        if self.index >= self.count:
            self.epoch, self.index = self.epoch + 1, 0
            self._shuffle()
            return None
        if not self.ahead:
            numbers = self.order[self.index : self.index + READ_AHEAD].tolist()
            self.ahead = self.fetch(numbers)[::-1]
        self.index += 1
        return self.ahead.pop()

    def _shuffle(self) -> None:
        self.order = torch.randperm(self.count, generator=generator(self.seed, "documents", self.epoch))
        self.ahead = []


class StreamedTexts:
    """Documents of a data set that is too large to store, in its order; a mark is reached without reading up to it.

    Args:
        dataset: a `datasets.IterableDataset`.
        column: the column with the text.
        name: the data set, for messages.
        content: what `identity` returns.
    """

    def __init__(self, dataset: Any, column: str, name: str, content: str):
        self.dataset, self.column, self.name, self.content = dataset, column, name, content
        self.start = copy.deepcopy(dataset.state_dict())
        self.seek({"epoch": 0, "stream": self.start})

    def identity(self) -> str:
        return self.content

    def mark(self) -> dict[str, Any]:
        if self.unread is not None:
            return self.unread
        # A copy, because the data set goes on writing into the state that it returned.
        return {"epoch": self.epoch, "stream": copy.deepcopy(self.dataset.state_dict())}

    def seek(self, mark: dict[str, Any]) -> None:
        self.epoch = mark["epoch"]
        self.dataset.load_state_dict(copy.deepcopy(mark["stream"]))
        self.rows = iter(self.dataset)
        # Until a row is read, the data set's state is that of the iteration before.
        self.unread: dict[str, Any] | None = mark

    def next(self) -> tuple[str, str] | None:
        try:
            row = next(self.rows)
            self.unread = None
        except StopIteration:
            self.seek({"epoch": self.epoch + 1, "stream": self.start})
            return None
        except Exception as error:  # a file that is damaged, or a connection that broke: many types, most not OSError
            raise Refused("source.text", f"cannot read {self.name}: {one_line(error)}") from error
        if self.column not in row:
            raise no_column(self.column, self.name, row)
        return document(row[self.column], self.column, self.name)


def document(text: Any, column: str, name: str) -> tuple[str, str]:
    """A row's text with its identity: a hash of the text, so that copies of a document are on one side of the split.

    Raises:
        Refused: the row holds something other than text.
    """
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise Refused(
            "source.text_column",
            f"column {column!r} of {name!r} holds {type(text).__name__}, not text: name the column with the text",
        )
    data = text.encode("utf-8", "replace")
    return hashlib.blake2b(data, digest_size=16).hexdigest(), data.decode("utf-8")


def part(texts: Texts, share: float, *, held_out: bool) -> Iterator[str | None]:
    """The texts of one side of the split, endlessly; None at the end of each epoch."""
    while True:
        following = texts.next()
        if following is None:
            yield None
            continue
        identity, text = following
        if is_held_out(identity, share) == held_out:
            yield text


def no_column(column: str, name: str, columns: Iterable[str]) -> Refused:
    """The error where a data set has other columns."""
    return Refused("source.text_column", f"{name!r} has no column {column!r} (it has: {', '.join(map(str, columns))})")
