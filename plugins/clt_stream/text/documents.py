"""The documents to read: shuffled anew in every epoch where they can be, and split into a trained and a held-out part.

Both kinds of text know their place as a small `mark`, and can be put back to it exactly.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from clt_plugins import Refused
from clt_stream.text.stdlib import is_held_out, python_stdlib

if TYPE_CHECKING:
    from clt_stream import StreamConfig

READ_AHEAD = 64
"""Documents fetched from a stored data set at a time."""


class Texts(Protocol):
    """Documents, epoch after epoch."""

    def mark(self) -> dict[str, Any]:
        """Where the next document stands, as JSON."""

    def seek(self, mark: dict[str, Any]) -> None:
        """Go back to a mark."""

    def next(self) -> tuple[str, str] | None:
        """The next document as (identity, text); None at the end of an epoch, and then the next epoch's first."""


class StoredTexts:
    """Documents that can be reached by number: each epoch has its own order, drawn from (seed, epoch).

    Args:
        fetch: gives the documents of some numbers below `count`, as (identity, text).
    """

    def __init__(self, count: int, fetch: Callable[[Sequence[int]], list[tuple[str, str]]], seed: int):
        self.count, self.fetch, self.seed = count, fetch, seed
        self.epoch = self.index = 0
        self.ahead: list[tuple[str, str]] = []
        self._shuffle()

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
    """Documents of a data set too large to store, in its own order; its position resumes without reading it again.

    Args:
        dataset: a `datasets.IterableDataset`.
        column: the column with the text.
        name: for messages.
    """

    def __init__(self, dataset: Any, column: str, name: str):
        self.dataset, self.column, self.name = dataset, column, name
        self.start = copy.deepcopy(dataset.state_dict())
        self.seek({"epoch": 0, "stream": self.start})

    def mark(self) -> dict[str, Any]:
        if self.unread is not None:
            return self.unread
        # The data set goes on writing into the state that it gave.
        return {"epoch": self.epoch, "stream": copy.deepcopy(self.dataset.state_dict())}

    def seek(self, mark: dict[str, Any]) -> None:
        self.epoch = mark["epoch"]
        self.dataset.load_state_dict(copy.deepcopy(mark["stream"]))
        self.rows = iter(self.dataset)
        # Until a row is read, the data set's own state is that of the iteration before.
        self.unread: dict[str, Any] | None = mark

    def next(self) -> tuple[str, str] | None:
        try:
            row = next(self.rows)
            self.unread = None
        except StopIteration:
            self.seek({"epoch": self.epoch + 1, "stream": self.start})
            return None
        except (OSError, ValueError) as error:
            raise Refused("source.text", f"cannot read {self.name}: {one_line(error)}") from error
        if self.column not in row:
            raise ValueError(_no_column(self.column, self.name, row))
        return document(row[self.column], self.column, self.name)


def open_texts(config: StreamConfig, seed: int) -> Texts:
    """The documents that a recipe names.

    Raises:
        ValueError: they do not exist, cannot be read or reached, or hold nothing.
    """
    if config.text == "python-stdlib":
        documents = _stdlib()
        return StoredTexts(len(documents), lambda numbers: [documents[n] for n in numbers], seed)
    from clt_stream.text.hub import open_dataset

    dataset = open_dataset(config)
    name, column = config.text, config.text_column
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise ValueError(_no_column(column, name, columns))
    if config.streaming:
        return StreamedTexts(dataset, column, name)
    if not len(dataset):
        raise Refused("source.text", f"{name!r} holds no documents")
    texts = dataset.select_columns([column])

    def fetch(numbers: Sequence[int]) -> list[tuple[str, str]]:
        return [document(text, column, name) for text in texts[list(numbers)][column]]

    return StoredTexts(len(dataset), fetch, seed)


@cache
def _stdlib() -> list[tuple[str, str]]:
    """Read once for the trained and the held-out part."""
    return python_stdlib()


def document(text: Any, column: str, name: str) -> tuple[str, str]:
    """A row's text with an identity: a hash of the text, so that copies of a document stay on one side of the split.

    Raises:
        ValueError: the row holds something else than text.
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
        found = texts.next()
        if found is None:
            yield None
        elif is_held_out(found[0], share) == held_out:
            yield found[1]


def generator(*key: Any) -> torch.Generator:
    """Random numbers that depend on the key only."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _no_column(column: str, name: str, known: Any) -> str:
    return f"source.text_column: {name!r} has no column {column!r} (it has: {', '.join(map(str, known))})"
