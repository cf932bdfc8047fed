"""The features that graphs name, a JSON file each: `NUMBER.json`, NUMBER being `feature` of the graph's node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clt_feature_files.circuit_tracer import unpaired
from clt_feature_files.features import Features
from clt_plugins import Faults, Refused, load_json

if TYPE_CHECKING:
    from clt_feature_files import FeatureJsonConfig
    from clt_plugins import Collected, Facts

KIND = "cross layer transcoder"
"""The `feature_type` of a node that is a feature."""


class FeatureJson:
    """Writes the files."""

    def __init__(self, config: FeatureJsonConfig):
        self.config = config

    def write(self, collected: Collected, facts: Facts, folder: Path) -> None:
        numbers = sorted({number for graph in self.config.graphs for number in named(graph, collected)})
        features = Features(collected, facts.name or "transcoder", self.config.bins)
        for number in numbers:
            text = json.dumps(features.feature(*unpaired(number)), separators=(",", ":"))
            (folder / f"{number}.json").write_text(text, encoding="ascii")


def named(graph: Path, collected: Collected) -> Iterator[int]:
    """The numbers of all features in a graph.

    Raises:
        Refused: it is no graph, or one of a larger transcoder.
    """
    try:
        data = load_json(graph)
        nodes = [(node["feature_type"], node["feature"]) for node in data["nodes"]]
    except (OSError, Faults, KeyError, TypeError) as error:
        raise Refused("reports.feature-json.graphs", f"{graph} is no graph of circuit-tracer: {error}") from error
    info = collected.info
    for kind, number in nodes:
        if kind != KIND:
            continue
        if not isinstance(number, int) or number < 0:
            raise Refused("reports.feature-json.graphs", f"{graph} names a feature {number!r}: not a number")
        layer, feature = unpaired(number)
        if layer >= info.n_layers or feature >= info.n_features:
            text = f"{graph} names feature {feature} of layer {layer}, and the transcoder has {info.n_layers} layers of"
            raise Refused("reports.feature-json.graphs", f"{text} {info.n_features}: it is of another transcoder")
        yield number
