"""What `collect` must find, by plain loops over all values; and a stage run on what a test has built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clt_plugins import Collected, CollectionInfo, Provenance, generator
from clt_plugins.finished.job import Job
from clt_plugins.finished.provenance import Origin, settings_of
from clt_plugins.finished.stages import build_stage, run_stage
from clt_plugins.model.assemble import Parts
from clt_plugins.recipe.structure import structure_choice
from tests.support.helpers import plugins

Array = np.ndarray[Any, Any]
MASK = 2**64 - 1


def collect(parts: Parts, folder: Path, *, recipe: Any = None, parallel: Any = None, **settings: Any) -> Collected:
    """Run the stage into a folder, and open what it wrote."""
    selected = structure_choice(plugins(), "stages", {"name": "collect", **settings})
    chosen = build_stage(selected, parts.context)
    job = Job(
        transcoder=parts.transcoder,
        source=parts.source,
        recipe=recipe,
        context=parts.context,
        plugins=plugins(),
        folder=folder,
        made_from=Provenance(
            transcoder=Origin(folder="transcoder", sha256="0" * 64), settings=settings_of(selected, chosen.info, recipe)
        ),
        show=lambda text, record: None,
        log=lambda metrics: None,
    )
    run_stage(chosen, job, folder, parallel=parallel)
    return Collected.open(folder)


def mixed(x: int) -> int:
    """splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draw(seed: int, name: str, number: int, row: int) -> int:
    """The random key of a feature (by its number in all layers) and a row."""
    salt = int(torch.randint(2**62, (1,), generator=generator(seed, "collect", name)))
    return mixed(mixed(number ^ salt) ^ row)


def neighbours(context: Array, position: Array, row: int, reach: int) -> tuple[int, int]:
    """The window around a row: the first row of it, and the one after."""
    start, stop = row, row + 1
    while start > 0 and row - start < reach and _next(context, position, start - 1):
        start -= 1
    while stop < len(context) and stop - row <= reach and _next(context, position, stop - 1):
        stop += 1
    return start, stop


def _next(context: Array, position: Array, row: int) -> bool:
    """Whether the row after this one is its neighbour."""
    return bool(context[row] == context[row + 1] and position[row + 1] == position[row] + 1)


def without_equal(rows: list[int], window: Any, limit: int) -> list[int]:
    """The first rows, each window once."""
    kept: list[int] = []
    seen = set()
    for row in rows:
        if window is None or window(row) not in seen:
            kept.append(row)
            seen.add(None if window is None else window(row))
    return kept[:limit]


def expected(info: CollectionInfo, ids: Array, context: Array, position: Array, values: Array) -> list[dict[str, Any]]:
    """What the arrays of each layer must be, as lists.

    Args:
        values: of every feature at every row, [T, L, F] float32.
    """
    settings = info.settings
    layers = []
    active_by_number = (values > 0).sum(0).ravel()
    flat = values.reshape(len(values), -1)

    def window(row: int) -> Any:
        start, stop = neighbours(context, position, row, settings.distinct or 0)
        return row - start, tuple(ids[start:stop].tolist())

    for layer in range(info.n_layers):
        out: dict[str, Any] = {name: [] for name in ("active", "maximum", "minimum", "mean", "histogram", "top_row")}
        out |= {name: [] for name in ("group_row", "group_edge", "windows", "coactive", "coactive_score")}
        for feature in range(info.n_features):
            number = layer * info.n_features + feature
            value = values[:, layer, feature]
            rows = sorted(np.flatnonzero(value > 0).tolist(), key=lambda row: (-value[row], row))
            same = None if settings.distinct is None else window
            out["active"].append(len(rows))
            out["maximum"].append(max((value[row] for row in rows), default=0))
            out["minimum"].append(min((value[row] for row in rows), default=0))
            out["mean"].append(np.mean([float(value[row]) for row in rows]) if rows else 0)
            counts = [0] * (len(info.edges) - 1)
            for row in rows:
                bin_ = sum(edge <= value[row] for edge in info.edges) - 1
                counts[min(max(bin_, 0), len(counts) - 1)] += 1
            out["histogram"].append(counts)
            top = without_equal(rows, same, settings.top)
            groups, edges = [], []
            for group in range(settings.groups):
                first = group * len(rows) // settings.groups
                members = rows[first : (group + 1) * len(rows) // settings.groups]
                by_key = sorted(members, key=lambda row: draw(settings.seed, "groups", number, row))
                chosen = without_equal(by_key, same, settings.per_group)
                groups.append(sorted(chosen, key=rows.index))
                edges.append(value[rows[min(first, len(rows) - 1)]] if rows else 0)
            out["top_row"].append(_filled(top, settings.top))
            out["group_row"].append([_filled(group, settings.per_group) for group in groups])
            out["group_edge"].append([*edges, value[rows[-1]] if rows else 0])
            examples = [*out["top_row"][-1], *(row for group in out["group_row"][-1] for row in group)]
            out["windows"].append([_window(value, context, position, row, settings.window) for row in examples])
            sample = sorted(rows, key=lambda row: draw(settings.seed, "tokens", number, row))
            sample = sample[: settings.coactive_tokens]
            scores = []
            for other in range(flat.shape[1]) if sample else ():
                of_f, of_g = len(rows), int(active_by_number[other])
                together = sum(flat[row, other] > 0 for row in sample)
                if together and other != number:
                    cosine = together / len(sample) * np.sqrt(of_f / of_g)
                    scores.append((-min(cosine, np.sqrt(min(of_f, of_g) / max(of_f, of_g))), other))
            best = sorted(scores)[: settings.coactive]
            out["coactive"].append(_filled([other for _, other in best], settings.coactive))
            missing = [0.0] * (settings.coactive - len(best))
            out["coactive_score"].append([-score for score, _ in best] + missing)
        layers.append(out)
    return layers


def _filled(rows: list[int], size: int) -> list[int]:
    return rows + [-1] * (size - len(rows))


def _window(value: Array, context: Array, position: Array, row: int, reach: int) -> list[tuple[int, float]]:
    if row < 0:
        return []
    start, stop = neighbours(context, position, row, reach)
    return [(other - row, float(value[other])) for other in range(start, stop) if value[other] > 0]


def check(store: Collected, values: Array) -> None:
    """Compare a store with what it must hold.

    Args:
        values: of every feature at every row of the store's text, [T, L, F] float32.
    """
    text, info = store.text, store.info
    truth = expected(info, np.array(text.ids), np.array(text.context), np.array(text.position), values)
    for layer, right in enumerate(truth):
        arrays = store.layer(layer)
        for name in ("active", "histogram", "top_row", "group_row", "coactive", "maximum", "minimum", "group_edge"):
            assert arrays[name].tolist() == np.array(right[name]).tolist(), (layer, name)
        for name in ("mean", "coactive_score"):
            np.testing.assert_allclose(arrays[name], right[name], rtol=1e-6, err_msg=name)
        for rows, found in (("top_row", "top_value"), ("group_row", "group_value")):
            row = arrays[rows].reshape(info.n_features, -1)
            there = np.take_along_axis(values[:, layer].T, np.maximum(row, 0), 1) * (row >= 0)
            assert np.array_equal(arrays[found].reshape(row.shape), there), (layer, found)
        for feature in range(info.n_features):
            part = slice(*arrays["window_start"][feature : feature + 2])
            offsets, found = arrays["window_offset"][part].tolist(), arrays["window_value"][part].tolist()
            assert list(zip(offsets, found, strict=True)) == [
                one for window in right["windows"][feature] for one in window
            ]
            assert arrays["window_count"][feature].tolist() == [len(one) for one in right["windows"][feature]]
