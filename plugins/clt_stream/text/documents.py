"""The order in which documents are read, and their split into a trained and a held-out part.

Every kind of text knows its position as a small `mark`, and can go back to it exactly.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from clt_plugins import Refused, generator
from clt_stream.library_errors import one_line
from clt_stream.text.stdlib import is_held_out

log = logging.getLogger(__name__)

READ_AHEAD = 64
"""Documents that are fetched from a stored data set at a time."""


class Texts(Protocol):
    """Documents, epoch after epoch."""

    def identity(self) -> str:
        """A digest of the content, and how much it is; the same wherever the text lies and whatever it is called."""

    def again(self, seed: int) -> Texts:
        """The same documents from their beginning, in the order of another seed."""

    def mark(self) -> dict[str, Any]:
        """The position of the next document, as JSON."""

    def seek(self, mark: dict[str, Any]) -> None:
        """Go to a mark."""

    def next(self) -> tuple[str, str] | None:
        """The next document as (identity, text); None at the end of an epoch, and then the next epoch's first."""


class Documents(Protocol):
    """Documents that can be reached by number."""

    count: int

    def identity(self) -> str:
        """As that of `Texts`."""

    def fetch(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Some documents, as (identity, text)."""


class StoredTexts:
    """Documents that can be reached by number: each epoch has an order of its own, drawn from (seed, epoch).

    Args:
        name: the text, for messages.
        shuffled: otherwise they come in their own order.
    """

    def __init__(self, documents: Documents, name: str, seed: int, *, shuffled: bool = True):
        self.documents, self.name, self.seed, self.shuffled = documents, name, seed, shuffled
        self.count = documents.count
        self.epoch = self.index = 0
        self.ahead: list[tuple[str, str]] = []
        """Documents that were read but not yet yielded, the next one last."""
        self._shuffle()

    def identity(self) -> str:
        return self.documents.identity()

    def again(self, seed: int) -> Texts:
        return StoredTexts(self.documents, self.name, seed, shuffled=self.shuffled)

    def mark(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def seek(self, mark: dict[str, Any]) -> None:
        if not 0 <= mark.get("index", -1) <= self.count:
            raise not_the_same(self.name)
        self.epoch, self.index = mark["epoch"], mark["index"]
        self._shuffle()

    def next(self) -> tuple[str, str] | None:
        if self.index >= self.count:
            self.epoch, self.index = self.epoch + 1, 0
            self._shuffle()
            return None
        if not self.ahead:
            end = min(self.index + READ_AHEAD, self.count)
            numbers = range(self.index, end) if self.order is None else self.order[self.index : end].tolist()
            self.ahead = self.documents.fetch(numbers)[::-1]
        self.index += 1
        return self.ahead.pop()

    def _shuffle(self) -> None:
        draw = generator(self.seed, "documents", self.epoch)
        self.order = torch.randperm(self.count, generator=draw) if self.shuffled else None
        self.ahead = []


class StreamedTexts:
    """Documents of a data set that is too large to store, in its order; a mark is reached without reading up to it.

    Args:
        open_dataset: returns a `datasets.IterableDataset` and what `identity` returns.
        column: the column with the text.
        name: the data set, for messages.
    """

    def __init__(self, open_dataset: Callable[[], tuple[Any, str]], column: str, name: str):
        self.open, self.column, self.name = open_dataset, column, name
        self.dataset, self.content = open_dataset()
        columns = self.dataset.column_names
        if columns is not None and column not in columns:
            raise no_column(column, name, columns)
        self.rows_read = self.nulls = 0
        self.start = copy.deepcopy(self.dataset.state_dict())
        self.seek({"epoch": 0, "stream": self.start})

    def identity(self) -> str:
        return self.content

    def again(self, seed: int) -> Texts:
        return StreamedTexts(self.open, self.column, self.name)

    def mark(self) -> dict[str, Any]:
        if self.unread is not None:
            return self.unread
        # A copy, because the data set goes on writing into the state that it returned.
        return {"epoch": self.epoch, "stream": copy.deepcopy(self.dataset.state_dict())}

    def seek(self, mark: dict[str, Any]) -> None:
        if "stream" not in mark:
            raise not_the_same(self.name)
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
            self._tell_nulls()
            return None
        except Exception as error:  # a file that is damaged, or a connection that broke: many types, most not OSError
            raise Refused("source.text", f"cannot read {self.name}: {one_line(error)}") from error
        if self.column not in row:
            raise no_column(self.column, self.name, row)
        self.rows_read += 1
        self.nulls += row[self.column] is None
        return document(row[self.column], self.column, self.name)

    def _tell_nulls(self) -> None:
        """At the end of the first epoch, as they cannot be counted before."""
        if self.nulls and self.epoch == 1:
            tell_nulls(self.nulls, self.rows_read)


def document(text: Any, column: str, name: str) -> tuple[str, str]:
    """A row's text with its identity: a hash of the text, so that copies of a document are on one side of the split.

    Raises:
        Refused: the row holds something other than text.
    """
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise not_text(text, column, name)
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


def check_split(texts: Texts, share: float, name: str) -> None:
    """Refuse a text without documents to train on, or to hold out where a share of them is asked for.

    Reads no more documents than it must, and does not tokenise them.

    Raises:
        Refused: says which of the causes it is.
    """
    count = filled = 0
    sides: set[bool] = set()
    needed = {False, True} if share else {False}
    while (following := texts.next()) is not None:
        identity, text = following
        count += 1
        if text.strip():
            filled += 1
            sides.add(is_held_out(identity, share))
            if sides >= needed:
                return
    if not filled:
        empty = f": all {count} documents are empty" if count else ""
        raise Refused("source.text", f"{name!r} holds no text to train on{empty}")
    if False not in sides:
        raise Refused(
            "source.held_out",
            f"{name!r} holds no text to train on: all {filled} documents are held out: lower source.held_out, or cut "
            f"the text with source.sample_by",
        )
    raise nothing_held_out(name, share, filled)


def nothing_held_out(name: str, share: float, count: int | None = None) -> Refused:
    """The error where no document is on the held-out side."""
    told = "" if count is None else f" (none of {count} documents)"
    return Refused(
        "source.held_out",
        f"no held-out text in {name!r} at a share of {share:g}{told}: raise the share, or give more documents "
        f"(source.sample_by cuts text files into smaller ones)",
    )


def tell_nulls(nulls: int, count: int, more: str = "") -> None:
    """Say how many rows have no text."""
    log.warning("source.text: %d of %d documents are null, and read as empty ones%s", nulls, count, more)


def not_the_same(name: str) -> Refused:
    """The error where a state does not fit the text."""
    return Refused("source.text", f"{name!r} is not what it was when the state was saved")


def not_text(value: Any, column: str, name: str, row: int | None = None) -> Refused:
    """The error where a row holds something else.

    Args:
        value: what it holds, or the name of its type.
    """
    kind = value if row is not None and isinstance(value, str) else type(value).__name__
    where = "" if row is None else f" in row {row}"
    return Refused(
        "source.text_column",
        f"column {column!r} of {name!r} holds {kind}, not text{where}: name the column with the text",
    )


def no_column(column: str, name: str, columns: Iterable[str]) -> Refused:
    """The error where a data set has other columns."""
    names = list(map(str, columns))
    near = difflib.get_close_matches(column, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return Refused("source.text_column", f"{name!r} has no column {column!r}{hint} (it has: {shown})")
