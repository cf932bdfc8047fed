"""`data/site.js`: the run, and the sizes of all the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from clt_plugins import __version__
from clt_reports.site.data.features import Layer

if TYPE_CHECKING:
    from clt_plugins import CollectionInfo, Facts

FORMAT = 1

DENSE_ABOVE = 0.1
"""A feature that is active at more than this share of tokens is over-dense."""

DENSITY_EDGES = [-8.0 + 0.25 * step for step in range(33)]
"""Edges of the bins of the histogram of densities: log10 of the share of tokens."""

THRESHOLD_BINS = 50


def layer_summary(arrays: Layer, tokens: int) -> dict[str, Any]:
    """What the run page says of a layer, counted over its features."""
    active = np.asarray(arrays["active"])
    density = active / max(1, tokens)
    alive = np.log10(density[active > 0]).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    return {
        "dead": int((active == 0).sum()),
        "dense": int((density > DENSE_ABOVE).sum()),
        "l0": float(active.sum() / max(1, tokens)),
        "density": np.histogram(alive, DENSITY_EDGES)[0].tolist(),
        "threshold": _thresholds(arrays.get("threshold")),
    }


def _thresholds(threshold: np.ndarray | None) -> dict[str, Any] | None:
    finite = threshold[np.isfinite(threshold)] if threshold is not None else ()
    if not len(finite):
        return None
    counts, edges = np.histogram(np.asarray(finite, dtype=np.float64), THRESHOLD_BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def of_collection(info: CollectionInfo) -> dict[str, Any]:
    """What the store says of itself."""
    settings = info.settings
    return {
        "n_layers": info.n_layers,
        "n_features": info.n_features,
        "d_model": info.d_model,
        "tokens": info.tokens,
        "contexts": info.contexts,
        "activation": info.activation,
        "language_model": jsonable(info.model or {}),
        "spelled": info.spelled,
        "examples": {
            "top": settings.top,
            "groups": settings.groups,
            "per_group": settings.per_group,
            "window": settings.window,
            "distinct": settings.distinct,
            "text": settings.text,
        },
        "histogram_edges": info.edges,
    }


STARTS = ("time", "step", "changed", "end")
"""What a site says of each start of the run."""


def of_run(facts: Facts) -> dict[str, Any]:
    """What the run's folder tells; what is not known is left out."""
    single: dict[str, Any] = {}
    by_layer: dict[str, Any] = {}
    for name, curve in facts.curves.items():
        many = any(isinstance(value, list) for value in curve.value)
        (by_layer if many else single)[name] = {"step": curve.step, "value": curve.value}
    known = {
        "name": facts.name,
        "folder": facts.folder,
        "recipe": facts.recipe_text,
        "model": facts.recipe.get("model"),
        "source": facts.recipe.get("source"),
        "transcoder": attrs.asdict(facts.transcoder) if facts.transcoder is not None else None,
        "versions": facts.versions,
        # Not which machine and process: a site may be published.
        "history": [{key: start[key] for key in STARTS if key in start} for start in facts.history],
        "curves": single,
        "curves_by_layer": by_layer,
        "evaluation": facts.evaluation,
        "circuits": facts.circuits,
        "notes": facts.notes,
    }
    return {name: jsonable(value) for name, value in known.items() if value not in (None, "", {}, [])}


def site(info: CollectionInfo, facts: Facts, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The whole file.

    Args:
        rest: what the other files add: `shard`, `text`, `layers`, ...
    """
    made_from = facts.transcoder or (info.made_from.transcoder if info.made_from is not None else None)
    return {
        "format": FORMAT,
        "title": facts.name or (made_from.folder if made_from is not None else "") or "transcoder",
        "id": ((made_from.sha256 if made_from is not None else None) or "")[:16],
        "made_by": f"clt-plugins {__version__}",
        **of_collection(info),
        "dense_above": DENSE_ABOVE,
        "density_edges": DENSITY_EDGES,
        **rest,
        "run": of_run(facts),
    }


def jsonable(value: Any) -> Any:
    """Plain data without what JSON lacks: numbers that are not finite become None, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
