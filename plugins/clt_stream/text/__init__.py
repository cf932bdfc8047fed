"""The documents that a recipe names: files, a data set of the hub, or the standard library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clt_plugins import Refused
from clt_stream.text.documents import StoredTexts, StreamedTexts, Texts
from clt_stream.text.files import is_local, local_path
from clt_stream.text.local import LocalDocuments
from clt_stream.text.stdlib import StandardLibrary

if TYPE_CHECKING:
    from clt_stream import StreamConfig


def open_texts(config: StreamConfig, seed: int) -> Texts:
    """The documents that a recipe names.

    Files of this machine are read once to the end, so that all that is wrong with them is found before work starts.

    Raises:
        Refused: they do not exist, cannot be read or reached, or hold nothing.
    """
    name = config.text
    if name == "python-stdlib" or is_local(name):
        for setting, chosen in (("subset", config.subset != ""), ("split", config.split != "train")):
            if chosen:
                text = "is for data sets of the hub, and source.text is on this disk: leave it out"
                if name != "python-stdlib":
                    text += ", and name the file or folder to be read in source.text"
                raise Refused(f"source.{setting}", text)
    if name == "python-stdlib":
        return StoredTexts(StandardLibrary(), name, seed)
    if is_local(name):
        return StoredTexts(LocalDocuments(local_path(name), config), name, seed, shuffled=not config.streaming)
    from clt_stream.text.hub import HubDocuments, open_dataset  # imports `datasets`, which takes a second

    if config.streaming:
        return StreamedTexts(lambda: open_dataset(config), config.text_column, name)
    return StoredTexts(HubDocuments(config), name, seed)
