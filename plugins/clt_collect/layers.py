"""The arrays of a layer, from the logs: block by block, so that memory holds the pairs of one block.

Shapes: T rows of the text, F features per layer, B features of a block, N pairs of a block, K top examples, Q groups,
E examples of each, X = K + Q * E, H bins, M tokens for co-activity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from clt_collect.choose import draw_key, first_ones, group_of, likely_drawn, ranked
from clt_collect.coactive import ByRow, coactive
from clt_collect.log import SHARD
from clt_collect.rows import Array, Rows
from clt_collect.written import Written
from clt_plugins import CollectionSettings


@attrs.frozen(eq=False)
class Pairs:
    """The active tokens of the features first : first + B of a layer, by feature, then by row."""

    first: int
    """The number of the first one, in the layer."""
    begin: Array
    """Feature b has the pairs begin[b] : begin[b + 1], [B + 1]."""
    feature: Array
    """The feature of each pair, counted from `first`, [N] int64."""
    row: Array
    """The row of the text, [N] int64."""
    value: Array
    """[N] float32."""


class Layers:
    """The arrays of all layers, for `CollectedWriter.features`.

    Args:
        logs: of all ranks, in their order.
        same: a number for each row, the same for equal windows, [T]; None: all are different.
        salts: two numbers that random draws depend on: of the groups, and of the tokens for co-activity.
        edges: edges of the histogram's bins, [H + 1].
        joined: the column `feature` of all logs, one after the other.
    """

    def __init__(
        self,
        logs: Sequence[Written],
        tensor_ranks: int,
        n_features: int,
        rows: Rows,
        same: Array | None,
        settings: CollectionSettings,
        salts: tuple[int, int],
        edges: Array,
        joined: Array,
    ):
        self.logs, self.tensor_ranks, self.n_features = logs, tensor_ranks, n_features
        self.rows, self.same, self.settings, self.salts, self.edges = rows, same, settings, salts, edges
        self.n_tokens = len(rows.text.ids)
        self.n_layers = (logs[0].columns["start"].shape[1] - 1) // len(logs[0].own)
        self.active = self._active()
        """At how many tokens each feature is active, [L, F] int64."""
        self.by_row = _by_row(logs, tensor_ranks, rows, joined)

    def _active(self) -> Array:
        active = np.zeros((self.n_layers, self.n_features), np.int64)
        for log in self.logs:
            counts = sum(
                (np.diff(starts) for starts in log.columns["start"]), np.zeros(self.n_layers * len(log.own), int)
            )
            active[:, log.own.start : log.own.stop] += counts.reshape(self.n_layers, len(log.own))
        return active

    def arrays(self, layer: int) -> dict[str, Array]:
        """The arrays of a layer, without its thresholds."""
        settings, active = self.settings, self.active[layer]
        parts: list[dict[str, Array]] = []
        sampled = np.minimum(active, settings.coactive_tokens)
        sample = np.zeros((self.n_features, int(sampled.max(initial=0))), np.int32)
        for first, last in self._blocks(active):
            pairs = self._pairs(layer, first, last)
            parts.append(self._block(layer, pairs, active[first:last]))
            if settings.coactive:
                entry, number = self._sample(layer, pairs, active[first:last])
                sample[first + pairs.feature[entry], number] = pairs.row[entry]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays["active"] = active
        counts = arrays["window_count"].sum(1, dtype=np.int64)
        arrays["window_start"] = np.concatenate([[0], np.cumsum(counts)])
        arrays["coactive"], arrays["coactive_score"] = coactive(
            layer * self.n_features, sample, sampled, self.active.ravel(), self.by_row, settings.coactive
        )
        return arrays

    def _blocks(self, active: Array) -> Iterator[tuple[int, int]]:
        """Ranges of features with no more pairs than a shard, or of one feature."""
        ends = np.cumsum(active)
        first = 0
        while first < len(active):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + SHARD, side="right")))
            yield first, last
            first = last

    def _pairs(self, layer: int, first: int, last: int) -> Pairs:
        features, rows, values = [], [], []
        for rank, log in enumerate(self.logs):
            low, high = max(first, log.own.start), min(last, log.own.stop)
            if low >= high:
                continue
            number = self.rows.number[rank // self.tensor_ranks]
            at = layer * len(log.own) - log.own.start
            for starts in log.columns["start"]:
                begin = starts[at + low : at + high + 1]
                part = slice(begin[0], begin[-1])
                features.append(np.repeat(np.arange(low - first, high - first), np.diff(begin)))
                rows.append(number[log.columns["row"][part]])
                values.append(log.columns["value"][part])
        feature, row = np.concatenate(features), np.concatenate(rows).astype(np.int64)
        value = np.concatenate(values)
        # Made of runs that are sorted already, which a stable sort is quick with.
        order = np.argsort(feature * self.n_tokens + row, kind="stable")
        feature, row, value = feature[order], row[order], value[order]
        begin = np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=last - first))])
        return Pairs(first, begin, feature, row, value)

    def _block(self, layer: int, pairs: Pairs, active: Array) -> dict[str, Array]:
        """All arrays of a block but the co-active features."""
        settings, features = self.settings, len(active)
        order = ranked(pairs.feature, pairs.value)
        feature = pairs.feature  # the features are in the same order
        rank = np.arange(len(order)) - pairs.begin[feature]
        arrays = self._statistics(pairs, active)

        row, value = pairs.row[order], pairs.value[order]
        same = None if self.same is None else self.same[row]
        entry, number = first_ones(
            feature, rank.astype(np.uint64), same, settings.top, rank < 2 * settings.top + 8, features
        )
        top_row, top_value = _empty(features, settings.top)
        top_row[feature[entry], number], top_value[feature[entry], number] = row[entry], value[entry]

        group_row, group_value = _empty(features, settings.groups * settings.per_group)
        edge = np.zeros((features, settings.groups + 1), np.float32)
        some = active > 0
        for group in range(settings.groups):
            strongest = np.minimum(group * active // settings.groups, active - 1)
            edge[some, group] = value[(pairs.begin[:-1] + strongest)[some]]
        edge[some, -1] = value[(pairs.begin[1:] - 1)[some]]
        if settings.groups and settings.per_group:
            segment, entry, number = self._drawn(layer, pairs, active, row, rank, same)
            # In each group the strongest first, as they stand.
            resorted = np.lexsort((rank[entry], segment[entry]))
            entry = entry[resorted]
            to = segment[entry] % settings.groups * settings.per_group + number
            group_row[feature[entry], to], group_value[feature[entry], to] = row[entry], value[entry]

        arrays |= {"top_row": top_row, "top_value": top_value, "group_edge": edge}
        shape = (features, settings.groups, settings.per_group)
        arrays |= {"group_row": group_row.reshape(shape), "group_value": group_value.reshape(shape)}
        return arrays | self._windows(pairs, np.concatenate([top_row, group_row], 1))

    def _statistics(self, pairs: Pairs, active: Array) -> dict[str, Array]:
        features, bins = len(active), len(self.edges) - 1
        some = np.flatnonzero(active)
        begin = pairs.begin[some]
        out = {name: np.zeros(features, np.float32) for name in ("maximum", "minimum", "mean")}
        if len(some):
            out["maximum"][some] = np.maximum.reduceat(pairs.value, begin)
            out["minimum"][some] = np.minimum.reduceat(pairs.value, begin)
            out["mean"][some] = np.add.reduceat(pairs.value.astype(np.float64), begin) / active[some]
        bin_ = np.clip(np.searchsorted(self.edges, pairs.value, side="right") - 1, 0, bins - 1)
        counts = np.bincount(pairs.feature * bins + bin_, minlength=features * bins)
        return out | {"histogram": counts.reshape(features, bins).astype(np.int64)}

    def _drawn(
        self, layer: int, pairs: Pairs, active: Array, row: Array, rank: Array, same: Array | None
    ) -> tuple[Array, Array, Array]:
        """The examples of each group: the segment of each entry, the entries chosen, and which each one is."""
        groups, of_feature = self.settings.groups, active[pairs.feature]
        group = group_of(rank, of_feature, groups)
        size = (group + 1) * of_feature // groups - group * of_feature // groups
        segment = pairs.feature * groups + group
        key = draw_key(self.salts[0], self._number(layer, pairs), row)
        likely = likely_drawn(key, size, self.settings.per_group)
        entry, number = first_ones(segment, key, same, self.settings.per_group, likely, len(active) * groups)
        return segment, entry, number

    def _sample(self, layer: int, pairs: Pairs, active: Array) -> tuple[Array, Array]:
        """Tokens of each feature at which co-active ones are counted."""
        key = draw_key(self.salts[1], self._number(layer, pairs), pairs.row)
        likely = likely_drawn(key, active[pairs.feature], self.settings.coactive_tokens)
        return first_ones(pairs.feature, key, None, self.settings.coactive_tokens, likely, len(active))

    def _number(self, layer: int, pairs: Pairs) -> Array:
        return layer * self.n_features + pairs.first + pairs.feature

    def _windows(self, pairs: Pairs, examples: Array) -> dict[str, Array]:
        """The values around examples, rows [B, X]."""
        reach = self.settings.window
        there = examples >= 0
        row = np.where(there, examples, 0).astype(np.int64).ravel()
        start, stop = self.rows.text.around(row, reach, reach)
        key = pairs.feature * self.n_tokens + pairs.row
        base = np.repeat(np.arange(len(examples)) * self.n_tokens, examples.shape[1])
        low, high = np.searchsorted(key, base + start), np.searchsorted(key, base + stop)
        count = np.where(there.ravel(), high - low, 0)
        ends = np.cumsum(count)
        entry = np.arange(ends[-1] if len(ends) else 0) + np.repeat(low - (ends - count), count)
        return {
            "window_count": count.reshape(examples.shape).astype(np.int32),
            "window_offset": (pairs.row[entry] - np.repeat(row, count)).astype(np.int16),
            "window_value": pairs.value[entry],
        }


def _empty(features: int, examples: int) -> tuple[Array, Array]:
    return np.full((features, examples), -1, np.int32), np.zeros((features, examples), np.float32)


def _by_row(logs: Sequence[Written], tensor_ranks: int, rows: Rows, joined: Array) -> ByRow:
    """Where the active features of each row of the text are in `joined`."""
    begins = np.cumsum([0, *(len(log.columns["feature"]) for log in logs)])
    rank, at = rows.source
    start = np.empty((tensor_ranks, len(at)), np.int64)
    count = np.empty((tensor_ranks, len(at)), np.int32)
    for number, log in enumerate(logs):
        part, of_rank = number % tensor_ranks, rank == number // tensor_ranks
        counts = log.columns["count"]
        ends = np.cumsum(counts, dtype=np.int64)
        count[part, of_rank] = counts[at[of_rank]]
        start[part, of_rank] = begins[number] + (ends - counts)[at[of_rank]]
    return ByRow(joined, start, count)


def edges(lowest: float | None, highest: float | None, bins: int) -> Any:
    """Edges of the bins of all histograms, [bins + 1] float64: from the smallest active value to the largest, but over
    six decades at most."""
    high = highest or 1.0
    low = max(lowest or high, high * 1e-6)
    if low == high:
        low = high / 2
    return np.geomspace(low, high, bins + 1)
