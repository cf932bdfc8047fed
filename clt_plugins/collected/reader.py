"""Reading a store.

Shapes: T rows, F features per layer; see `schema`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
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
from clt_plugins.collected.sound import check_features, check_geometry, check_info, check_text, check_vocabulary
from clt_plugins.collected.tensors import map_arrays
from clt_plugins.collected.text import CollectedText, Ints, Vocabulary, show
from clt_plugins.errors import Refused
from clt_plugins.files.folders import check_folder, recover
from clt_plugins.files.records import read_json


@attrs.frozen(eq=False)
class FeatureExample:
    """A token at which a feature is active, with the feature's values around it."""

    row: int
    """The row of the token in the text."""
    value: float
    """The feature's value there."""
    start: int
    """The row that the window begins with."""
    values: Ints
    """The feature's value at each token of the window, float32: row start + i has values[i]."""

    @property
    def stop(self) -> int:
        """The row after the window."""
        return self.start + len(self.values)


@attrs.frozen(eq=False)
class FeatureExamples:
    """The examples of one feature."""

    top: list[FeatureExample]
    """The largest values first."""
    groups: list[list[FeatureExample]]
    """Drawn from groups of equal size of its active values, the largest values first."""


class Collected:
    """A store that `collect` wrote. All arrays are mapped from disk, and cannot be written to.

    Open it with `Collected.open`.
    """

    def __init__(self, folder: Path, info: CollectionInfo, text: CollectedText, vocabulary: Vocabulary):
        self.folder, self.info, self.text, self.vocabulary = folder, info, text, vocabulary
        self._sizes = sizes(info)
        self._layers: dict[int, dict[str, Ints]] = {}

    @classmethod
    def open(cls, folder: Path | str, *, checksums: bool = True) -> Collected:
        """Open a store.

        Args:
            checksums: whether to compare all files with the manifest, which reads them once.

        Raises:
            Refused: there is none, or it is not complete, or damaged; names the file.
        """
        folder = Path(folder)
        recover(folder)
        if not (folder / RECORD).is_file():
            raise Refused(folder, f"no {RECORD} in it: make it with `clt-plugins collect`")
        if checksums:
            check_folder(folder, needs=(RECORD, TEXT, VOCABULARY, FEATURES.format(0)))
        info = read_json(folder / RECORD, CollectionInfo)
        check_info(folder / RECORD, info)
        letters = sizes(info)
        text = map_arrays(folder / TEXT, ARRAYS_OF_TEXT, letters)
        check_text(folder / TEXT, text, info)
        pieces = map_arrays(folder / VOCABULARY, ARRAYS_OF_VOCABULARY, letters)
        check_vocabulary(folder / VOCABULARY, pieces)
        vocabulary = Vocabulary(pieces["token"], pieces["start"], pieces["bytes"])
        return cls(folder, info, CollectedText(text["ids"], text["context"], text["position"]), vocabulary)

    @property
    def ids(self) -> Ints:
        """The token id of each row, [T] int32."""
        return self.text.ids

    def layer(self, layer: int) -> dict[str, Ints]:
        """The arrays of a layer by name: those of `ARRAYS_OF_FEATURES`, and of `ARRAYS_OF_GEOMETRY` if the store has
        them. A layer is checked when it is opened first.

        Raises:
            IndexError: there is no such layer.
            Refused: its file is damaged.
        """
        if not 0 <= layer < self.info.n_layers:
            raise IndexError(f"no layer {layer}: there are {self.info.n_layers}")
        if layer not in self._layers:
            path = self.folder / FEATURES.format(layer)
            arrays = map_arrays(path, ARRAYS_OF_FEATURES, self._sizes)
            check_features(path, arrays, self.info)
            if self.info.geometry is not None:
                path = self.folder / GEOMETRY.format(layer)
                geometry = map_arrays(path, ARRAYS_OF_GEOMETRY, self._sizes)
                check_geometry(path, geometry, self.info)
                arrays |= geometry
            self._layers[layer] = arrays
        return self._layers[layer]

    def density(self, layer: int) -> Ints:
        """The share of tokens at which each feature is active, [F] float64."""
        active: Ints = self.layer(layer)["active"] / max(1, self.info.tokens)
        return active

    def spell(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each token; one may be a part of a character.

        Raises:
            Refused: the store does not spell an id: it is damaged.
        """
        try:
            return self.vocabulary.spell(ids)
        except KeyError as error:
            raise Refused(self.folder / VOCABULARY, f"damaged: token {error} is missing") from error

    def show(self, start: int, stop: int) -> str:
        """Rows start : stop of the text as text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            Refused: see `spell`.
        """
        return show(self.spell(self.ids[start:stop]))

    def examples(self, layer: int, feature: int) -> FeatureExamples:
        """The examples of a feature, with its values around each.

        Raises:
            IndexError: there is no such layer or feature.
            Refused: the layer's file is damaged.
        """
        arrays = self.layer(layer)
        settings = self.info.settings
        if not 0 <= feature < self.info.n_features:
            raise IndexError(f"no feature {feature}: there are {self.info.n_features}")
        rows = np.concatenate([arrays["top_row"][feature], arrays["group_row"][feature].ravel()])
        values = np.concatenate([arrays["top_value"][feature], arrays["group_value"][feature].ravel()])
        counts = arrays["window_count"][feature]
        ends = arrays["window_start"][feature] + np.cumsum(counts)
        start, stop = self.text.around(np.maximum(rows, 0).astype(np.int64), settings.window, settings.window)
        examples: list[FeatureExample | None] = []
        for row, value, first, last, end, count in zip(rows, values, start, stop, ends, counts, strict=True):
            if row < 0:
                examples.append(None)
                continue
            dense = np.zeros(last - first, np.float32)
            entries = slice(end - count, end)
            where = row - first + arrays["window_offset"][entries].astype(np.int64)
            if ((where < 0) | (where >= len(dense))).any():
                text = f"damaged: feature {feature} has a window beyond its context"
                raise Refused(self.folder / FEATURES.format(layer), text)
            dense[where] = arrays["window_value"][entries]
            examples.append(FeatureExample(int(row), float(value), int(first), dense))
        top, per_group = settings.top, settings.per_group
        groups = [examples[top + n * per_group : top + (n + 1) * per_group] for n in range(settings.groups)]
        return FeatureExamples(_there(examples[:top]), [_there(group) for group in groups])


def _there(examples: Iterable[Any]) -> list[FeatureExample]:
    return [one for one in examples if one is not None]
