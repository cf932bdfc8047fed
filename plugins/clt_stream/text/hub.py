"""Text from data sets of the Hugging Face hub, by the library `datasets`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets

from clt_plugins import Refused
from clt_stream.library_errors import one_line, reason
from clt_stream.text.documents import document, no_column, tell_nulls

if TYPE_CHECKING:
    from clt_stream import StreamConfig

ABOUT = {
    "BuilderConfig": "source.subset",
    "Config name": "source.subset",
    "Unknown split": "source.split",
    "Bad split": "source.split",
}
"""Beginnings of messages of `datasets`, and the setting that each is about. All others are about the name."""


class HubDocuments:
    """The documents of a data set that is stored on disk, by number.

    Raises:
        Refused: as `open_dataset`; it has no such column, or no documents.
    """

    def __init__(self, config: StreamConfig):
        self.name, self.column = config.text, config.text_column
        dataset, self.content = open_dataset(config)
        if self.column not in dataset.column_names:
            raise no_column(self.column, self.name, dataset.column_names)
        self.count = len(dataset)
        if not self.count:
            raise Refused("source.text", f"{self.name!r} holds no documents")
        self.texts = dataset.select_columns([self.column])
        if nulls := self.texts.data.column(self.column).null_count:
            tell_nulls(nulls, self.count)

    def identity(self) -> str:
        return self.content

    def fetch(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        try:
            texts = self.texts[list(numbers)][self.column]
        except (OSError, ValueError) as error:
            raise Refused("source.text", f"cannot read {self.name}: {one_line(error)}") from error
        return [document(text, self.column, self.name) for text in texts]


def open_dataset(config: StreamConfig) -> tuple[Any, str]:
    """A `Dataset`, or an `IterableDataset` if `config.streaming`; and the identity of its content.

    Raises:
        Refused: there is no such data set, subset or split; a file cannot be read; the hub does not answer.
    """
    name = config.text
    try:
        builder = datasets.load_dataset_builder(name, config.subset or None)
        content = f"revision {builder.hash}"
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split), content
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split), content
    except MemoryError:
        raise
    except Exception as error:  # types differ: OSError, ValueError, those of datasets, huggingface_hub and pyarrow
        setting = next((key for start, key in ABOUT.items() if str(error).startswith(start)), "source.text")
        kinds = " (text is a file, a folder, a hub data set, or 'python-stdlib')" if setting == "source.text" else ""
        raise Refused(setting, f"{reason(error, name)}{kinds}") from error
