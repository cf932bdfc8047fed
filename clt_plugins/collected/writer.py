"""Writing a store, for `collect` and for what fills in the geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clt_plugins.collected.info import RECORD, CollectionInfo
from clt_plugins.collected.schema import (
    ARRAYS_OF_FEATURES,
    ARRAYS_OF_GEOMETRY,
    ARRAYS_OF_TEXT,
    ARRAYS_OF_VOCABULARY,
    FEATURES,
    GEOMETRY,
    TEXT,
    VOCABULARY,
    sizes,
)
from clt_plugins.collected.tensors import Arrays, write_arrays
from clt_plugins.collected.text import Ints, Vocabulary
from clt_plugins.files.records import write_json


class CollectedWriter:
    """Writes a store into an empty folder, file by file; `finish` comes last.

    Args:
        folder: where to write; the caller makes it atomic (`Job.folder` is).
        info: what the store holds.
    """

    def __init__(self, folder: Path, info: CollectionInfo):
        self.folder, self.info = folder, info
        self._sizes = sizes(info)
        self._tokens: set[int] = set()

    def text(self, ids: Ints, context: Ints, position: Ints) -> None:
        """The tokens that were read, sorted by context and position.

        Args:
            ids: [T] int32.
            context: [T] int64.
            position: [T] int32.

        Raises:
            ValueError: an array has another type or shape.
        """
        arrays = {"ids": ids, "context": context, "position": position}
        write_arrays(self.folder / TEXT, arrays, ARRAYS_OF_TEXT, self._sizes)
        self._tokens.update(np.unique(ids).tolist())

    def features(self, layer: int, arrays: Arrays) -> None:
        """Statistics and examples of a layer, as `ARRAYS_OF_FEATURES` says.

        Raises:
            ValueError: an array is missing, or has another type or shape.
        """
        write_arrays(self.folder / FEATURES.format(layer), arrays, ARRAYS_OF_FEATURES, self._sizes)

    def geometry(self, layer: int, arrays: Arrays) -> None:
        """What follows from the weights of a layer, as `ARRAYS_OF_GEOMETRY` says.

        Raises:
            ValueError: an array is missing, or has another type or shape.
        """
        write_arrays(self.folder / GEOMETRY.format(layer), arrays, ARRAYS_OF_GEOMETRY, self._sizes)
        for name in ("logits_up_id", "logits_down_id"):
            self._tokens.update(one for one in np.unique(arrays[name]).tolist() if one >= 0)

    def finish(self, spell: Callable[[Sequence[int]], Sequence[bytes]] | None) -> None:
        """The bytes of all tokens that occur in what this writer wrote, and `collected.json`.

        Args:
            spell: gives the bytes of tokens; None where nothing does: then the text of token 17 is `<17>`.
        """
        tokens = sorted(self._tokens)
        pieces: Mapping[int, bytes] = dict(
            zip(tokens, [b"<%d>" % one for one in tokens] if spell is None else spell(tokens), strict=True)
        )
        letters = {"V": len(pieces), "V+1": len(pieces) + 1}
        write_arrays(self.folder / VOCABULARY, Vocabulary.of(pieces).arrays(), ARRAYS_OF_VOCABULARY, letters)
        write_json(self.folder / RECORD, self.info)
