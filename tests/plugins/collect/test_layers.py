"""The arrays of a store, against plain loops over all values: with ties, repeated text, many shards and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt_collect import layers as layers_module
from clt_collect import log as log_module
from clt_collect.choose import first_ones
from clt_collect.layers import Layers, edges
from clt_collect.log import Log
from clt_collect.rows import equal_windows, sort_rows
from clt_collect.stage import _salts
from clt_collect.written import Written
from clt_plugins import Collected, CollectedWriter, CollectionInfo, CollectionSettings
from clt_plugins.files.folders import atomic_folder
from tests.support.collect_truth import check

LAYERS, FEATURES = 2, 7
GRIDS = {"one": (1, 1), "tensor": (2, 1), "data": (1, 3), "both": (3, 2)}
"""Tensor and data ranks."""


def values_of(tokens: int, random: np.random.Generator) -> Any:
    """Values of all features: sparse and dense ones, a dead one, and many equal values."""
    values = np.round(random.lognormal(0, 1, (tokens, LAYERS, FEATURES)), 1).astype(np.float32)
    values *= random.random(values.shape) < np.linspace(0, 1, FEATURES) ** 2
    values[:, 1, 3] = 0
    values[:, 0, 5] *= np.arange(tokens) == 17
    return values


def text_of(tokens: int, random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Few words, so that windows repeat; contexts of several lengths, with gaps between their pieces."""
    ids = random.integers(0, 3, tokens).astype(np.int32)
    ids[tokens // 2 :] = ids[: tokens - tokens // 2]
    context = np.sort(random.integers(0, 9, tokens)).astype(np.int64) * 5
    gaps = random.random(tokens) < 0.1
    position = (np.arange(tokens) + np.cumsum(gaps)).astype(np.int32)
    return ids, context, position


def write(folder: Path, grid: tuple[int, int], settings: CollectionSettings, seed: int = 0) -> tuple[Collected, Any]:
    """A store from the logs of some ranks, each of which adds a few rows at a time; and the values that they logged."""
    random = np.random.default_rng(seed)
    tokens = 240
    values, (ids, context, position) = values_of(tokens, random), text_of(tokens, random)
    tensor, data = grid
    (folder / "log").mkdir(parents=True)
    of_rank = random.permutation(tokens) if data > 1 else np.arange(tokens)
    logs = []
    for rank in range(tensor * data):
        own = range(rank % tensor * FEATURES // tensor, (rank % tensor + 1) * FEATURES // tensor)
        log = Log(folder / "log", rank, LAYERS * len(own), "test")
        log.begin(0)
        mine = of_rank[rank // tensor :: data]
        for part in np.array_split(mine, 9):
            sub = values[part][:, :, own.start : own.stop].reshape(len(part), -1)
            token, number = np.nonzero(sub)
            layer, feature = np.divmod(number, len(own))
            rows = {"ids": ids[part], "context": context[part], "position": position[part]}
            rows["count"] = (sub > 0).sum(1)
            log.add(rows, (layer * FEATURES + own.start + feature).astype(np.int32), number, sub[token, number])
            if log.full:
                log.write(0, None)
        log.write(1, None, complete=True)
        log.close()
        logs.append(Written.open(log, log.commit, rank, own, LAYERS))
    rows = sort_rows(logs, tensor)
    bins = edges(float(values[values > 0].min()), float(values.max()), 6)
    info = CollectionInfo(
        tokens=tokens,
        contexts=len(set(context.tolist())),
        n_layers=LAYERS,
        d_model=4,
        n_features=FEATURES,
        settings=settings,
        edges=bins.tolist(),
        activation="relu",
    )
    same = None if settings.distinct is None else equal_windows(rows.text, settings.distinct)
    joined = np.concatenate([log.columns["feature"] for log in logs])
    made = Layers(logs, tensor, FEATURES, rows, same, settings, _salts(settings.seed), bins, joined)
    with atomic_folder(folder / "store") as partial:
        writer = CollectedWriter(partial, info)
        writer.text(rows.text.ids, rows.text.context, rows.text.position)
        for layer in range(LAYERS):
            writer.features(layer, made.arrays(layer))
        writer.finish(None)
    return Collected.open(folder / "store"), values


SETTINGS = CollectionSettings(
    seed=5, top=6, groups=3, per_group=4, window=4, distinct=1, coactive=4, coactive_tokens=15
)


@pytest.mark.parametrize("grid", GRIDS)
def test_arrays_are_those_of_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str) -> None:
    # Shards and blocks of a few pairs, so that there are many.
    monkeypatch.setattr(log_module, "SHARD", 150)
    monkeypatch.setattr(layers_module, "SHARD", 150)
    store, values = write(tmp_path, GRIDS[grid], SETTINGS)
    check(store, values)
    assert store.spell([0, 2]) == [b"<0>", b"<2>"]


@pytest.mark.parametrize(
    "changes",
    [{"distinct": None}, {"distinct": 0}, {"top": 0}, {"groups": 0}, {"coactive": 0}, {"window": 0}, {"groups": 300}],
    ids=str,
)
def test_each_setting(tmp_path: Path, changes: dict[str, Any]) -> None:
    import attrs

    store, values = write(tmp_path, (1, 1), attrs.evolve(SETTINGS, **changes))
    check(store, values)


def test_the_draw_does_not_depend_on_ranks_or_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = write(tmp_path / "one", (1, 1), SETTINGS)
    monkeypatch.setattr(log_module, "SHARD", 40)
    monkeypatch.setattr(layers_module, "SHARD", 40)
    other, _ = write(tmp_path / "other", (2, 2), SETTINGS)
    files = [path.name for path in sorted(one.folder.iterdir())]
    assert all((one.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in files)


def test_segments_that_need_more_than_the_likely_entries() -> None:
    segment = np.array([0, 0, 0, 0, 1, 1])
    key = np.array([1, 2, 3, 4, 1, 2], np.uint64)
    same = np.array([7, 7, 8, 9, 7, 7])
    likely = np.array([True, True, False, False, True, False])
    entry, number = first_ones(segment, key, same, 2, likely, 2)
    assert entry.tolist() == [0, 2, 4]
    assert number.tolist() == [0, 1, 0]


def test_rows_that_come_twice_are_refused(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, 1, "test")
    log.begin(0)
    rows = {"ids": [1, 1], "context": [0, 0], "position": [3, 3], "count": [0, 0]}
    empty = np.empty(0, np.int64)
    log.add({name: np.array(one) for name, one in rows.items()}, empty, empty, empty.astype(np.float32))
    log.write(1, None)
    with pytest.raises(ValueError, match="position 3 of context 0 twice: read fewer"):
        sort_rows([Written.open(log, log.commit, 0, range(1), 1)], 1)
