"""circuit-tracer's local features, for its own page (`circuit_tracer.frontend.local_server.serve`).

| file | what it holds |
| --- | --- |
| `index.json.gz` | for each layer, `filename` and `offsets`, [F + 1] |
| `layer_LL.bin` | feature f at offsets[f] : offsets[f + 1], which the page asks for by an HTTP range |

A feature is four bytes, the length n as a little-endian integer, then n bytes: gzip of a `features.Feature` as JSON. A
graph names a feature by one number, which pairs layer and feature by Cantor's function.
"""

from __future__ import annotations

import gzip
import json
import struct
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_feature_files.features import Features

if TYPE_CHECKING:
    from clt_feature_files import CircuitTracerConfig
    from clt_plugins import Collected, Facts

LEVEL = 5
"""Of compression. 9 takes twice the time for 2 % less."""


class CircuitTracer:
    """Writes the files."""

    def __init__(self, config: CircuitTracerConfig):
        self.config = config

    def write(self, collected: Collected, facts: Facts, folder: Path) -> None:
        features = Features(collected, facts.name or "transcoder", self.config.bins)
        index: list[dict[str, Any]] = []
        for layer in range(collected.info.n_layers):
            name, offsets = f"layer_{layer:02}.bin", [0]
            with (folder / name).open("wb") as file:
                for feature in range(collected.info.n_features):
                    offsets.append(offsets[-1] + file.write(packed(features.feature(layer, feature))))
            index.append({"filename": name, "offsets": offsets})
        (folder / "index.json.gz").write_bytes(_compressed(index))


def packed(data: Any) -> bytes:
    """A feature as a file of a layer holds it."""
    compressed = _compressed(data)
    return struct.pack("<I", len(compressed)) + compressed


def _compressed(data: Any) -> bytes:
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode("ascii"), LEVEL, mtime=0)


def paired(layer: int, feature: int) -> int:
    """The one number of a feature in a graph: Cantor's pairing function."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def unpaired(number: int) -> tuple[int, int]:
    """The layer and the feature that a number stands for."""
    total = (isqrt(8 * number + 1) - 1) // 2
    feature = number - total * (total + 1) // 2
    return total - feature, feature
