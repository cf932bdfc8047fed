"""The features of a layer: columns for the list, and shards with everything of some hundred features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clt_reports.site.data.pack import packed, put
from clt_reports.site.data.words import Words

Layer = dict[str, np.ndarray]
"""The arrays of a layer of the store, by name; mapped."""

WORDS = {"logits_up_id": "logits_up_word", "logits_down_id": "logits_down_word"}
"""Arrays of token ids, and what the arrays of words are called."""

ENTRIES = ("window_offset", "window_value")
"""Arrays with any number of entries for a feature."""

COLUMNS = ("density", "maximum", "mean", "norm", "threshold", "word", "similar_cosine")
"""Of the list, in this order; some are not in every store."""


def columns(arrays: Layer, ids: np.ndarray, tokens: int, words: Words) -> dict[str, np.ndarray]:
    """The columns of a layer's list, [F] each.

    Args:
        ids: the token id of each row of the text, [T].
    """
    columns = {
        "density": arrays["active"] / max(1, tokens),
        "maximum": arrays["maximum"],
        "mean": arrays["mean"],
        "word": words.of(tokens_of(arrays["top_row"][:, :1], ids)).reshape(-1)
        if arrays["top_row"].shape[1]
        else np.full(len(arrays["active"]), -1),
    }
    if "norms" in arrays:
        columns["norm"] = np.sqrt(np.square(arrays["norms"], dtype=np.float64).sum(1))
    if "threshold" in arrays:
        columns["threshold"] = arrays["threshold"]
    if "similar_cosine" in arrays and arrays["similar_cosine"].shape[1]:
        columns["similar_cosine"] = arrays["similar_cosine"][:, 0]
    return {name: columns[name] for name in COLUMNS if name in columns}


def tokens_of(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The token ids of rows of the text; -1 where there is no row. Any shape."""
    return np.where(rows >= 0, np.asarray(ids)[np.maximum(rows, 0)], -1)


def shards(arrays: Layer, size: int, words: Words) -> Iterator[Layer]:
    """The arrays of each shard, features in their order."""
    n_features = len(arrays["active"])
    for first in range(0, n_features, size):
        stop = min(first + size, n_features)
        part: Layer = {}
        for name, array in arrays.items():
            if name == "window_start":
                part[name] = array[first : stop + 1] - array[first]
            elif name in ENTRIES:
                entries = arrays["window_start"]
                part[name] = array[int(entries[first]) : int(entries[stop])]
            elif name in WORDS:
                part[WORDS[name]] = words.of(array[first:stop])
            else:
                part[name] = array[first:stop]
        yield part


def write_layer(
    folder: Path, layer: int, arrays: Layer, ids: np.ndarray, tokens: int, words: Words, size: int
) -> list[str]:
    """Write a layer's list and shards; returns the names of the list's columns."""
    listed = columns(arrays, ids, tokens, words)
    put(folder, f"list/{layer:02}", packed(listed))
    for number, part in enumerate(shards(arrays, size, words)):
        put(folder, f"features/{layer:02}/{number:04}", packed(part))
    return list(listed)
