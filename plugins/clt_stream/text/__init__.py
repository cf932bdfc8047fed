"""The documents that a recipe names: files, a data set of the hub, or the standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from clt_plugins import Refused
from clt_stream.text.documents import StoredTexts, StreamedTexts, Texts, document, no_column
from clt_stream.text.stdlib import python_stdlib

if TYPE_CHECKING:
    from clt_stream import StreamConfig


def open_texts(config: StreamConfig, seed: int) -> Texts:
    """The documents that a recipe names.

    Raises:
        Refused: they do not exist, cannot be read or reached, or hold nothing.
    """
    if config.text == "python-stdlib":
        documents = _stdlib()
        return StoredTexts(len(documents), lambda numbers: [documents[n] for n in numbers], seed, _stdlib_content())
    from clt_stream.text.hub import open_dataset  # imports `datasets`, which takes a second

    dataset, content = open_dataset(config)
    name, column = config.text, config.text_column
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise no_column(column, name, columns)
    if config.streaming:
        return StreamedTexts(dataset, column, name, content)
    if not len(dataset):
        raise Refused("source.text", f"{name!r} holds no documents")
    texts = dataset.select_columns([column])

    def fetch(numbers: Sequence[int]) -> list[tuple[str, str]]:
        return [document(text, column, name) for text in texts[list(numbers)][column]]

    return StoredTexts(len(dataset), fetch, seed, content)


@cache
def _stdlib() -> list[tuple[str, str]]:
    """Read once, for the trained and the held-out part."""
    return python_stdlib()


@cache
def _stdlib_content() -> str:
    digest, size = hashlib.sha256(), 0
    for identity, text in _stdlib():
        data = text.encode("utf-8", "replace")
        digest.update(f"{identity}\0{len(data)}\0".encode())
        digest.update(data)
        size += len(data)
    return f"sha256 {digest.hexdigest()} of {len(_stdlib())} documents, {size} bytes"
