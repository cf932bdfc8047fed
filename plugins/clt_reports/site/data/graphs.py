"""Attribution graphs of circuit-tracer: read, checked, and written as `data/graphs/NAME.js`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from clt_plugins import Refused, parse_json, read_small
from clt_reports.site.data.pack import packed, put

LARGEST = 2**28
"""Bytes of the largest file that is read."""

NODES, LINKS = 50_000, 5_000_000
"""Nodes and links of the largest graph that is shown."""

KINDS = {
    "cross layer transcoder": "feature",
    "transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "embedding",
    "logit": "logit",
}
"""What a node's `feature_type` is called here."""

LESS = "prune the graph before it is written (node_threshold, edge_threshold), or leave it out"


@attrs.frozen(eq=False)
class Graph:
    """A graph that was read and checked."""

    name: str
    """Letters, digits, `-` and `_`."""
    value: dict[str, Any]
    """What its file puts, without the links."""
    links: dict[str, np.ndarray]
    """`source`, `target` and `weight` of each, [links]."""

    def summary(self) -> dict[str, Any]:
        """What `site.js` says of it."""
        of = {"nodes": len(self.value["nodes"]), "links": len(self.links["weight"])}
        return {"name": self.name, "title": self.value["title"], "prompt": self.value["prompt"], **of}

    def write(self, folder: Path) -> None:
        put(folder, f"graphs/{self.name}", {**self.value, "packed": packed(self.links)})


def read_graph(file: Path, n_layers: int, n_features: int, taken: set[str] | None = None) -> Graph:
    """The graph in a JSON file of circuit-tracer.

    Args:
        taken: names that other graphs have.

    Raises:
        Refused: it is no such file, or too large, or names features that the transcoder has not.
    """
    try:
        data = parse_json(read_small(file, LARGEST))
        return _graph(data, file.stem, n_layers, n_features, set() if taken is None else taken)
    except Refused as error:
        raise Refused(file, error.faults[0].text) from error
    except (ValueError, RecursionError) as error:
        raise Refused(file, f"no graph of circuit-tracer: {error}") from error


def _graph(data: Any, stem: str, n_layers: int, n_features: int, taken: set[str]) -> Graph:
    metadata, settings = _table(data, "metadata"), _table(data, "qParams", optional=True)
    nodes, links = _list(data, "nodes"), _list(data, "links")
    if len(nodes) > NODES or len(links) > LINKS:
        raise ValueError(f"{len(nodes):,} nodes and {len(links):,} links; at most {NODES:,} and {LINKS:,}: {LESS}")
    title = _text(metadata.get("slug"), "metadata.slug", stem) or stem
    tokens = [_text(one, "metadata.prompt_tokens") for one in _list(metadata, "prompt_tokens", "metadata.")]
    pinned = {_text(one, "qParams.pinnedIds") for one in _list(settings, "pinnedIds", "qParams.", optional=True)}
    made = [_node(one, f"nodes[{n}]", n_layers, n_features, pinned) for n, one in enumerate(nodes)]
    # circuit-tracer calls the error of layer L at position P `0_L_P`, as it calls feature L of layer 0 there. Links do
    # not say which of the two they mean: they are read as the feature's.
    others = {one["id"] for one in made if one["kind"] != "error"}
    made = [one for one in made if one["kind"] != "error" or one["id"] not in others]
    number = {one["id"]: n for n, one in enumerate(made)}
    if len(number) < len(made):
        raise ValueError("two nodes have one node_id")
    groups = _list(settings, "supernodes", "qParams.", optional=True)
    value = {
        "title": title,
        "prompt": _text(metadata.get("prompt"), "metadata.prompt", ""),
        "scan": _text(metadata.get("scan"), "metadata.scan", ""),
        "tokens": tokens,
        "nodes": made,
        "supernodes": [[_text(one, "qParams.supernodes") for one in _items(group)] for group in groups],
    }
    return Graph(_name(title, taken), value, _links(links, number))


def _node(data: Any, where: str, n_layers: int, n_features: int, pinned: set[str]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is no object")
    node_id = _text(data.get("node_id"), f"{where}.node_id")
    kind = KINDS.get(_text(data.get("feature_type"), f"{where}.feature_type"))
    if kind is None:
        raise ValueError(f"{where}.feature_type is {data['feature_type']!r}, expected one of {', '.join(KINDS)}")
    layer = _layer(data.get("layer"), where, kind, n_layers)
    position = data.get("ctx_idx")
    if type(position) is not int or position < 0:
        raise ValueError(f"{where}.ctx_idx is no number from 0")
    return {
        "id": node_id,
        "kind": kind,
        "layer": layer,
        "position": position,
        "feature": _feature(data.get("feature"), node_id, layer, n_features, where) if kind == "feature" else None,
        "label": _text(data.get("clerp"), f"{where}.clerp", ""),
        "influence": _number(data.get("influence"), f"{where}.influence"),
        "activation": _number(data.get("activation"), f"{where}.activation"),
        "probability": _number(data.get("token_prob"), f"{where}.token_prob") if kind == "logit" else None,
        "target": data.get("is_target_logit") is True,
        "pinned": node_id in pinned,
    }


def _layer(value: Any, where: str, kind: str, n_layers: int) -> int:
    if kind in ("embedding", "logit"):
        return -1 if kind == "embedding" else n_layers
    if not re.fullmatch(r"\d{1,6}", str(value)):
        raise ValueError(f"{where}.layer is {value!r}, expected the number of a layer")
    if int(value) >= n_layers:
        raise ValueError(f"{where} is in layer {value}, the transcoder has {n_layers}: it is another's graph")
    return int(value)


def _feature(value: Any, node_id: str, layer: int, n_features: int, where: str) -> int:
    """The number of a feature in its layer: circuit-tracer writes Cantor's pairing of the layer and the number; some
    files have it in the node's id alone (`layer_feature_position`)."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{where}.feature is no number from 0")
    diagonal = (math.isqrt(8 * value + 1) - 1) // 2
    number = value - diagonal * (diagonal + 1) // 2
    if diagonal - number != layer:
        match = re.fullmatch(r"(\d{1,6})_(\d{1,12})_\d+", node_id)
        if match is None or int(match[1]) != layer:
            raise ValueError(f"{where}.feature is {value}, which is no feature of layer {layer}")
        number = int(match[2])
    if number >= n_features:
        raise ValueError(f"{where} is feature {number}, a layer has {n_features}: it is another transcoder's graph")
    return number


def _links(links: list[Any], number: Mapping[str, int]) -> dict[str, np.ndarray]:
    source, target = np.zeros(len(links), np.int64), np.zeros(len(links), np.int64)
    weight = np.zeros(len(links), np.float64)
    for n, link in enumerate(links):
        try:
            source[n], target[n] = number[link["source"]], number[link["target"]]
            value = link["weight"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"links[{n}] names no two nodes with a weight") from error
        weight[n] = _number(value, f"links[{n}].weight", required=True)
    order = np.argsort(-np.abs(weight), kind="stable")
    return {"source": source[order], "target": target[order], "weight": weight[order]}


def _name(title: str, taken: set[str]) -> str:
    """A name for a file and an address, that no other graph has."""
    base = re.sub(r"[^A-Za-z0-9_-]+", "-", title)[:60].strip("-") or "graph"
    name, number = base, 1
    while name.lower() in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(name.lower())
    return name


def _table(data: Any, key: str, *, optional: bool = False) -> Mapping[str, Any]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key!r} is missing, or no object")
    return value


def _list(data: Any, key: str, above: str = "", *, optional: bool = False) -> list[Any]:
    value = data.get(key) if isinstance(data, Mapping) else None
    if value is None and optional:
        return []
    if not isinstance(value, list):
        raise ValueError(f"'{above}{key}' is missing, or no list")
    return value


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("'qParams.supernodes' is no list of lists")
    return value


def _text(value: Any, where: str, otherwise: str | None = None) -> str:
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, str):
        raise ValueError(f"{where} is no text")
    return value


def _number(value: Any, where: str, *, required: bool = False) -> Any:
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is no number")
    return float(value)
