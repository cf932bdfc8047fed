"""Random stores that are consistent, of any size: for tests of whatever reads a store.

`make_store(folder)` writes a small one, with hostile tokens in its text. All that it says of a feature follows from one
set of values, drawn at random: maxima, examples, groups and windows fit together. Geometry is random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np

from clt_plugins.collected.info import CollectionInfo, CollectionSettings, GeometryInfo
from clt_plugins.collected.writer import CollectedWriter
from clt_plugins.files.folders import atomic_folder

Array = np.ndarray[Any, Any]

EMOJI = "👩‍🚀".encode()

HOSTILE: list[bytes] = [
    b"</script>",
    b"<script>alert(1)</script>",
    b"<img src=x onerror=alert(1)>",
    b"<!--",
    b"]]>",
    b"&lt;",
    "\u202eabc".encode(),  # right-to-left override
    "\u200f".encode(),  # right-to-left mark
    "\u2028".encode(),  # ends a line in JavaScript before 2019
    b"\x00",
    b"a\x00b",
    b"\n",
    b"\r\n",
    b"\t",
    b"'\"`${}\\",
    EMOJI[:2],  # one character, split over three tokens: none is UTF-8 by itself
    EMOJI[2:7],
    EMOJI[7:],
    b"\xff\xfe",  # no UTF-8 at all
    b"x" * 100_000,
    b"",
    b" ",
]
"""Bytes of tokens that break careless pages. They have the ids 0, 1, 2, ... of a store with `hostile`."""


@attrs.frozen(kw_only=True)
class Sizes:
    """How large a store is."""

    layers: int = 2
    d_model: int = 16
    features: int = 24
    tokens: int = 600
    contexts: int = 9
    top: int = 4
    groups: int = 3
    per_group: int = 2
    window: int = 5
    coactive: int = 3
    similar: int = 3
    virtual: int = 3
    logits: int = 3
    bins: int = 16
    vocabulary: int = 100
    most_active: int = 40
    """A feature is active at most at so many tokens; some at none."""


def make_store(
    folder: Path,
    *,
    seed: int = 0,
    geometry: bool = True,
    thresholds: bool = True,
    hostile: bool = True,
    **sizes: Any,
) -> Sizes:
    """Write a random store into a new folder. The same seed gives the same bytes.

    Args:
        geometry: whether it has `geometry_LL.safetensors`.
        thresholds: whether it has thresholds.
        hostile: whether the tokens of `HOSTILE` are in its text, one after the other at its beginning, and at random.
        sizes: see `Sizes`; `layers=12, features=25_000` are 300,000 features.
    """
    size = Sizes(**sizes)
    random = np.random.default_rng(seed)
    info = CollectionInfo(
        tokens=size.tokens,
        contexts=size.contexts,
        n_layers=size.layers,
        d_model=size.d_model,
        n_features=size.features,
        settings=CollectionSettings(
            top=size.top,
            groups=size.groups,
            per_group=size.per_group,
            window=size.window,
            coactive=size.coactive,
            coactive_tokens=64,
        ),
        edges=np.geomspace(1e-3, 1e2, size.bins + 1).tolist(),
        activation="jumprelu" if thresholds else "topk",
        thresholds=thresholds,
        spelled=True,
        model={"path": "made-up"},
        geometry=GeometryInfo(similar=size.similar, virtual=size.virtual, logits=size.logits) if geometry else None,
    )
    with atomic_folder(folder) as partial:
        writer = CollectedWriter(partial, info)
        context, position = _contexts(size, random)
        ids = random.integers(0, size.vocabulary, size.tokens).astype(np.int32)
        if hostile:
            ids[: len(HOSTILE)] = np.arange(len(HOSTILE))[: size.tokens]
        writer.text(ids, context, position)
        # Where the stretch of neighbours of each row begins and ends.
        edges = np.flatnonzero(np.diff(context, prepend=-1, append=-1))
        number = np.searchsorted(edges, np.arange(size.tokens), side="right")
        stretch = edges[number - 1], edges[number]
        for layer in range(size.layers):
            writer.features(layer, _features(size, info, random, stretch, thresholds))
            if geometry:
                writer.geometry(layer, _geometry(size, random, layer))
        writer.finish(lambda tokens: [_piece(one, hostile) for one in tokens])
    return size


def _piece(token: int, hostile: bool) -> bytes:
    """Words with a space before, as most tokens of byte-level vocabularies are."""
    return HOSTILE[token] if hostile and token < len(HOSTILE) else f" word{token}".encode()


def _contexts(size: Sizes, random: np.random.Generator) -> tuple[Array, Array]:
    """Contexts of different lengths; positions begin with 1, since a context's first token is not read."""
    cuts = np.sort(random.choice(np.arange(1, size.tokens), size.contexts - 1, replace=False))
    starts = np.concatenate([[0], cuts])
    context = np.repeat(np.arange(size.contexts), np.diff(starts, append=size.tokens)).astype(np.int64)
    position = (np.arange(size.tokens) - starts[context] + 1).astype(np.int32)
    return context, position


def _features(
    size: Sizes, info: CollectionInfo, random: np.random.Generator, stretch: tuple[Array, Array], thresholds: bool
) -> dict[str, Array]:
    features, tokens = size.features, size.tokens
    # Active at one row of each of so many equal parts of the text, and half of the time at the next row too.
    parts = min(size.most_active, tokens // 2)
    width = tokens // parts
    base = np.arange(parts) * width + random.integers(0, width - 1, (features, parts))
    keep = random.random((features, parts)) < random.random((features, 1)) ** 2
    keep[random.random(features) < 0.05] = False
    pairs = np.stack([base, base + 1], 2)
    kept = np.stack([keep, keep & (random.random(keep.shape) < 0.5)], 2)
    key = (np.arange(features)[:, None, None] * tokens + pairs)[kept]
    feature, row = key // tokens, key % tokens
    value = random.lognormal(0, 1, len(key)).astype(np.float32) + np.float32(0.01)

    active = np.bincount(feature, minlength=features)
    begin = np.cumsum(active) - active
    order = np.lexsort((row, -value, feature))
    rank = np.arange(len(key)) - begin[feature]
    ranked_row, ranked_value = row[order], value[order]

    top_row = np.full((features, size.top), -1, np.int32)
    top_value = np.zeros((features, size.top), np.float32)
    chosen = rank < size.top
    top_row[feature[chosen], rank[chosen]] = ranked_row[chosen]
    top_value[feature[chosen], rank[chosen]] = ranked_value[chosen]

    group_row = np.full((features, size.groups, size.per_group), -1, np.int32)
    group_value = np.zeros((features, size.groups, size.per_group), np.float32)
    group_edge = np.zeros((features, size.groups + 1), np.float32)
    some = active > 0
    for group in range(size.groups):
        first, last = group * active // size.groups, (group + 1) * active // size.groups
        group_edge[some, group] = ranked_value[np.minimum(begin + first, begin + active - 1)[some]]
        for example in range(size.per_group):  # the first ones of each group: which ones does not matter to readers
            there = first + example < last
            index = (begin + first + example)[there]
            group_row[there, group, example], group_value[there, group, example] = (
                ranked_row[index],
                ranked_value[index],
            )
    group_edge[some, -1] = ranked_value[(begin + active - 1)[some]]

    rows = np.concatenate([top_row, group_row.reshape(features, -1)], 1).astype(np.int64)
    safe = np.maximum(rows, 0)
    first = np.maximum(stretch[0][safe], safe - size.window)
    last = np.minimum(stretch[1][safe], safe + size.window + 1)
    of_feature = np.arange(features)[:, None] * tokens
    low, high = np.searchsorted(key, of_feature + first), np.searchsorted(key, of_feature + last)
    count = np.where(rows < 0, 0, high - low)
    flat = count.ravel()
    entries = np.repeat(low.ravel() - (np.cumsum(flat) - flat), flat) + np.arange(flat.sum())

    sums = np.bincount(feature, value, features)
    filled = np.maximum(active, 1)
    bins = np.clip(np.searchsorted(info.edges, value, side="right") - 1, 0, size.bins - 1)
    histogram = np.bincount(feature * size.bins + bins, minlength=features * size.bins).reshape(features, size.bins)
    lowest = group_edge[:, -1]
    score = -np.sort(-random.random((features, size.coactive)).astype(np.float32))
    arrays = {
        "active": active.astype(np.int64),
        "maximum": group_edge[:, 0].copy(),
        "minimum": lowest.copy(),
        "mean": (sums / filled).astype(np.float32),
        "histogram": histogram.astype(np.int64),
        "top_row": top_row,
        "top_value": top_value,
        "group_row": group_row,
        "group_value": group_value,
        "group_edge": group_edge,
        "window_start": np.concatenate([[0], np.cumsum(count.sum(1))]).astype(np.int64),
        "window_count": count.astype(np.int32),
        "window_offset": (row[entries] - np.repeat(rows.ravel(), flat)).astype(np.int16),
        "window_value": value[entries],
        "coactive": _others(size, random, size.coactive, 0, size.layers),
        "coactive_score": score,
    }
    if thresholds:
        arrays["threshold"] = (lowest * np.float32(0.9)).astype(np.float32)
    return arrays


def _others(size: Sizes, random: np.random.Generator, count: int, first: int, last: int) -> Array:
    """Features of the layers first : last; -1 where there are none."""
    if first >= last:
        return np.full((size.features, count), -1, np.int32)
    low, high = first * size.features, last * size.features
    return random.integers(low, high, (size.features, count)).astype(np.int32)


def _geometry(size: Sizes, random: np.random.Generator, layer: int) -> dict[str, Array]:
    features, layers = size.features, size.layers

    def normal(*shape: int) -> Array:
        return random.standard_normal((features, *shape), dtype=np.float32)

    writes = np.arange(layers) >= layer
    cosines: Array = np.clip(normal(layers, layers) * np.float32(0.3), -1, 1)
    cosines = (cosines + cosines.transpose(0, 2, 1)) * np.float32(0.5)
    cosines[:, np.arange(layers), np.arange(layers)] = 1
    arrays = {
        "norms": np.abs(normal(layers)) * writes,
        "cosines": cosines * writes[:, None] * writes[None, :],
        "encoder_cosine": np.clip(normal(layers) * np.float32(0.3), -1, 1) * writes,
        "similar": _others(size, random, size.similar, 0, layers),
        "similar_cosine": -np.sort(-random.random((features, size.similar), dtype=np.float32)),
        "upstream": _others(size, random, size.virtual, 0, layer),
        "upstream_weight": normal(size.virtual) * (layer > 0),
        "downstream": _others(size, random, size.virtual, layer + 1, layers),
        "downstream_weight": normal(size.virtual) * (layer < layers - 1),
    }
    for name, sign in (("up", 1), ("down", -1)):
        ids = random.integers(0, size.vocabulary, (features, layers + 1, size.logits)).astype(np.int32)
        arrays[f"logits_{name}_id"] = ids
        arrays[f"logits_{name}_value"] = sign * -np.sort(-np.abs(normal(layers + 1, size.logits)))
    return {name: one.astype(one.dtype if one.dtype == np.int32 else np.float32) for name, one in arrays.items()}
