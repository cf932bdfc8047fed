"""What a sweep ends in: how L0, NMSE and cross-entropy of its members go together.

A member is on the frontier of a score if no other one has at most its L0 and a better score, or less L0 and a score as
good. Members that differ only in their seed are one point, with mean and spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from clt_plugins.files.records import FORMAT
from clt_plugins.toml import inline

FILE = "frontier.json"
SEEDS = ("seed", "data_seed")
"""Keys that only repeat a member."""
LOWER = {"nmse": True, "ce_recovered": False}
"""The scores that have a frontier over L0, and whether less of one is better."""

Status = Literal["trained", "failed", "interrupted", "waiting"]


@attrs.frozen(kw_only=True)
class Point:
    """A member and its scores on held-out tokens; None where they are not known, or not defined."""

    label: str
    """Its folder, in the sweep's."""
    settings: dict[str, Any]
    """What the sweep set."""
    status: Status
    """Whether it was trained to its end."""
    error: str | None = None
    """Why it failed."""
    step: int | None = None
    """Training steps done."""
    tokens: int | None = None
    """Tokens trained on."""
    l0: float | None = None
    """Active features per token, sum over layers."""
    nmse: float | None = None
    """Mean squared error / variance of the targets, mean over layers."""
    explained_variance: float | None = None
    dead_fraction: float | None = None
    """Share of features that were active at no held-out token."""
    ce: float | None = None
    """Cross-entropy of the language model with the transcoder in the place of its MLPs, nats per token."""
    ce_model: float | None = None
    """That of the unchanged language model."""
    ce_recovered: float | None = None
    """The share of the cross-entropy lost by zero-ablation of the MLPs that the transcoder saves."""
    optimal: list[str] = attrs.field(factory=list)
    """The scores, `nmse` and `ce_recovered`, on whose frontier over L0 it is."""


@attrs.frozen(kw_only=True)
class Spread:
    """A score over seeds."""

    mean: float
    std: float
    """Standard deviation with n - 1 in the denominator."""


@attrs.frozen(kw_only=True)
class Seeds:
    """Members that differ only in their seed, where there are several."""

    settings: dict[str, Any]
    """What they have in common of what the sweep set."""
    members: list[str]
    """Their labels."""
    scores: dict[str, Spread]
    """By name: `l0`, `nmse`, `ce_recovered`, as far as all of them have it."""


@attrs.frozen(kw_only=True)
class Frontier:
    """The content of `frontier.json`."""

    format: int = FORMAT
    """The version of this file."""
    name: str
    """The recipe's."""
    keys: list[str]
    """The settings that the sweep varies."""
    members: list[Point]
    """In the recipe's order."""
    seeds: list[Seeds] = attrs.field(factory=list)
    """Mean and spread over seeds."""


def frontier(name: str, keys: Sequence[str], points: Sequence[Point]) -> Frontier:
    """The frontier of members, which are marked where they are on it."""
    on = {score: optimal(points, score, lower=lower) for score, lower in LOWER.items()}
    marked = [attrs.evolve(point, optimal=[score for score in LOWER if point.label in on[score]]) for point in points]
    return Frontier(name=name, keys=list(keys), members=marked, seeds=_seeds(keys, points))


def optimal(points: Sequence[Point], score: str, *, lower: bool) -> set[str]:
    """The labels of the points that no other is better than: in L0 (less is better) and in a score."""
    known = {point.label: (point.l0, getattr(point, score)) for point in points}
    sign = 1 if lower else -1
    costs = {label: (l0, sign * value) for label, (l0, value) in known.items() if l0 is not None and value is not None}
    return {
        label
        for label, own in costs.items()
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in costs.values())
    }


def _seeds(keys: Sequence[str], points: Sequence[Point]) -> list[Seeds]:
    if not set(SEEDS) & set(keys):
        return []
    groups: dict[str, list[Point]] = {}
    for point in points:
        others = {key: value for key, value in point.settings.items() if key not in SEEDS}
        groups.setdefault(inline(others), []).append(point)
    out = []
    for several in groups.values():
        scored = [point for point in several if point.l0 is not None]
        if len(scored) < 2:
            continue
        spreads = {}
        for score in ("l0", *LOWER):
            values = [value for point in scored if (value := getattr(point, score)) is not None]
            if len(values) == len(scored):
                spreads[score] = Spread(mean=statistics.fmean(values), std=statistics.stdev(values))
        common = {key: value for key, value in scored[0].settings.items() if key not in SEEDS}
        out.append(Seeds(settings=common, members=[point.label for point in scored], scores=spreads))
    return out


def scores_of(report: Mapping[str, Any]) -> dict[str, float]:
    """A point's scores from what `evaluation.json` has; what is not there is left out."""
    inside = report.get("model") or {}
    entropy = inside.get("cross_entropy") or {}
    scores = {
        **{name: report.get(name) for name in ("l0", "nmse", "explained_variance", "dead_fraction")},
        "ce": entropy.get("transcoder"),
        "ce_model": entropy.get("model"),
        "ce_recovered": inside.get("ce_recovered"),
    }
    return {name: value for name, value in scores.items() if isinstance(value, int | float) and math.isfinite(value)}


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "l0": ("L0", lambda x: f"{x:.1f}"),
    "nmse": ("NMSE", lambda x: f"{x:.4f}"),
    "ce_recovered": ("CE recovered", lambda x: f"{x:.2%}"),
    "dead_fraction": ("dead", lambda x: f"{x:.1%}"),
}
"""Scores that tables show: the head, and how a number is written."""
MARKS = {"nmse": "NMSE", "ce_recovered": "CE"}
"""What a table calls the frontiers."""


def rows(result: Frontier) -> list[list[str]]:
    """A table of the members, its head first."""
    used = [name for name in COLUMNS if any(getattr(point, name) is not None for point in result.members)]
    table = [["member", *(COLUMNS[name][0] for name in used), "on the frontier of"]]
    for point in result.members:
        numbers = [shown(name, getattr(point, name)) for name in used]
        told = ", ".join(MARKS[score] for score in point.optimal) if point.status == "trained" else point.status
        table.append([point.label, *numbers, told])
    return table


def seed_rows(result: Frontier) -> list[list[str]]:
    """A table of means and spreads over seeds, its head first; empty where no seeds were swept."""
    if not result.seeds:
        return []
    used = [name for name in ("l0", *LOWER) if any(name in each.scores for each in result.seeds)]
    table = [["over seeds", "seeds", *(COLUMNS[name][0] for name in used)]]
    for each in result.seeds:
        common = ", ".join(f"{key.split('.')[-1]}={inline(value)}" for key, value in each.settings.items())
        numbers = [
            f"{shown(name, each.scores[name].mean)} ± {shown(name, each.scores[name].std)}"
            if name in each.scores
            else "-"
            for name in used
        ]
        table.append([common or "all", str(len(each.members)), *numbers])
    return table


def shown(name: str, value: float | None) -> str:
    """A score as tables write it."""
    return "-" if value is None else COLUMNS[name][1](value)


def as_text(result: Frontier) -> str:
    """The tables for a console."""
    return "\n\n".join(_aligned(table) for table in (rows(result), seed_rows(result)) if table)


def _aligned(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
