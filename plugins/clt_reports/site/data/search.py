"""The index from the text of tokens to features: those whose examples have the token, and those that promote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clt_reports.site.data.features import Layer, tokens_of
from clt_reports.site.data.pack import packed, put
from clt_reports.site.data.words import Words

LIMIT = 300
"""Features of a key in each list, at most: the best ones."""

SHARD = 20_000
"""Features in the lists of a shard, about: 100 kB."""

READ = 4096
"""Features that are looked at together."""

TOGETHER = 2**22
"""Features in lists, 16 bytes each, beyond which only the best are kept at once."""

LARGEST = 2**31 - 1


class Postings:
    """For each key the best features, by a score and then by how rarely they are active; in bounded memory.

    Args:
        keys: how many there are.
    """

    def __init__(self, keys: int):
        self.count = np.zeros(keys, dtype=np.int64)
        """Features of each key, also of those that are not kept."""
        self._kept: list[np.ndarray] = []

    def add(self, key: np.ndarray, feature: np.ndarray, score: np.ndarray, active: np.ndarray) -> None:
        """Add features of one layer: each pair of key and feature once.

        Args:
            key: the number of the key; -1 is left out.
            feature: its global number.
            score: the higher, the better; 0 to 255.
            active: the number of tokens at which it is active.
        """
        rows = np.stack([key, 255 - score, active.clip(max=LARGEST), feature]).astype(np.int32)[:, key >= 0]
        self.count += np.bincount(rows[0], minlength=len(self.count))
        self._kept.append(_best(rows))
        if sum(one.shape[1] for one in self._kept) > TOGETHER:
            self._kept = [_best(np.concatenate(self._kept, axis=1))]

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the features of each key begin, [keys + 1]; the features; their scores."""
        rows = _best(np.concatenate(self._kept, axis=1)) if self._kept else np.zeros((4, 0), dtype=np.int32)
        start = np.searchsorted(rows[0], np.arange(len(self.count) + 1))
        return start, rows[3], 255 - rows[1]


def _best(rows: np.ndarray) -> np.ndarray:
    """At most `LIMIT` columns of each key, in order."""
    key, score, active, feature = rows.astype(np.int64)
    rows = rows[:, np.lexsort((active << 31 | feature, key << 8 | score))]
    position = np.arange(rows.shape[1]) - np.searchsorted(rows[0], rows[0])
    return rows[:, position < LIMIT]


class Search:
    """The index of a site, filled layer by layer."""

    def __init__(self, words: Words, n_features: int):
        self.keys, self._key_of = words.keys()
        self._words, self._n_features = words, n_features
        self._lists = {"active": Postings(len(self.keys))}

    def add(self, layer: int, arrays: Layer, ids: np.ndarray) -> None:
        """Take in a layer."""
        active = np.asarray(arrays["active"])
        score = ("active", "top_row"), ("promotes", "logits_up_id")
        for name, source in score:
            if source not in arrays or not arrays[source].size:
                continue
            parts = []
            for first in range(0, len(active), READ):
                part = arrays[source][first : first + READ]
                tokens = tokens_of(part, ids) if name == "active" else np.asarray(part[:, -1])
                feature, key, value = _pairs(self._key(tokens), by_position=name == "promotes")
                parts.append(np.stack([key, feature + first, value]))
            key, feature, value = np.concatenate(parts, axis=1)
            postings = self._lists.setdefault(name, Postings(len(self.keys)))
            postings.add(key, layer * self._n_features + feature, value, active[feature])

    def _key(self, tokens: np.ndarray) -> np.ndarray:
        """The key of each token; -1 where there is none."""
        word = self._words.of(tokens)
        return np.where(word >= 0, self._key_of[word], -1) if len(self._key_of) else word

    def write(self, folder: Path) -> list[str]:
        """Write `data/search/`; returns the first key of each shard."""
        lists = {name: (*postings.finish(), postings.count) for name, postings in self._lists.items()}
        ends = sum((start[1:] for start, *_ in lists.values()), start=np.arange(1, len(self.keys) + 1))
        firsts: list[str] = []
        first = 0
        while first < len(self.keys):
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + SHARD, side="right")))
            arrays = {}
            for name, (start, feature, score, count) in lists.items():
                entries = slice(int(start[first]), int(start[stop]))
                arrays[f"{name}_start"] = start[first : stop + 1] - start[first]
                arrays[f"{name}_count"] = count[first:stop]
                arrays[f"{name}_feature"] = feature[entries]
                arrays[f"{name}_share"] = 255 - score[entries] if name == "promotes" else score[entries]
            put(folder, f"search/{len(firsts):04}", {"keys": self.keys[first:stop], "packed": packed(arrays)})
            firsts.append(self.keys[first])
            first = stop
        return firsts


def _pairs(keys: np.ndarray, *, by_position: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of a feature and a key once.

    Args:
        keys: of some features, [n, positions]; -1 for none.
        by_position: whether the score is 255 minus the first position of the key, or how many positions have it.

    Returns:
        The number of the feature, the key, the score.
    """
    feature = np.broadcast_to(np.arange(len(keys))[:, None], keys.shape)[keys >= 0]
    position = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)[keys >= 0]
    key = keys[keys >= 0]
    order = np.lexsort((position, key, feature))
    pair = np.stack([feature[order], key[order]])
    new = np.ones(pair.shape[1], dtype=bool)
    new[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)
    begin = np.flatnonzero(new)
    if by_position:
        score = 255 - position[order][begin].clip(max=255)
    else:
        score = np.diff(np.append(begin, pair.shape[1])).clip(max=255)
    return pair[0, begin], pair[1, begin], score
