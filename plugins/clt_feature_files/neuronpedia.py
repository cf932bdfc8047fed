"""Neuronpedia's bulk import.

| file, in `MODEL/LAYER-SOURCE_SET/` | a line of JSON for |
| --- | --- |
| `release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl` | what the features belong to |
| `features/batch-N.jsonl.gz` | each feature: its histogram, logits, similar features |
| `activations/batch-N.jsonl.gz` | each example: a text and the values in it |

The first four are used where Neuronpedia does not have such a thing yet. It has defaults for columns that are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clt_feature_files.features import exact
from clt_feature_files.rows import Activation, Row, feature_row, model_row, release_row, source_row, source_set_row
from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_feature_files import NeuronpediaConfig
    from clt_plugins import Collected, Facts, FeatureExample

LEVEL = 5
"""Of compression."""

TOP = -1.0
"""What `binMin` and `binContains` say of the strongest examples."""


class Neuronpedia:
    """Writes the files."""

    def __init__(self, config: NeuronpediaConfig):
        self.config = config

    def check(self, transcoder: Any) -> list[str]:
        """See `Checks.check`."""
        return self._complaints(transcoder.model_described())

    def write(self, collected: Collected, facts: Facts, folder: Path) -> None:
        described = collected.info.model or {}
        complaints = self._complaints(described)
        if complaints:
            raise Refused("reports.neuronpedia", "; ".join(complaints))
        model, numbers = self.config.model_id or Path(str(described["path"])).name, layers(collected)
        shown = Shown(collected, self.config, model)
        for layer, number in enumerate(numbers):
            source = f"{number}-{self.config.source_set}"  # Neuronpedia numbers layers as the language model does
            inside = folder / model / source
            for name in ("features", "activations"):
                (inside / name).mkdir(parents=True)
            for name, row in shown.belongs(source, facts).items():
                (inside / f"{name}.jsonl").write_bytes(_lines([row]))
            for file, first in enumerate(range(0, collected.info.n_features, self.config.batch)):
                batch = range(first, min(first + self.config.batch, collected.info.n_features))
                rows = [shown.feature(layer, feature, source) for feature in batch]
                texts = [one for feature in batch for one in shown.activations(layer, feature, source)]
                for name, lines in (("features", rows), ("activations", texts)):
                    data = gzip.compress(_lines(lines), LEVEL, mtime=0)
                    (inside / name / f"batch-{file}.jsonl.gz").write_bytes(data)

    def _complaints(self, model: Mapping[str, Any]) -> list[str]:
        """What is not known of the language model, of which a transcoder says this."""
        config, named = self.config, model.get("layers")
        texts = []
        if not config.model_id and not model.get("path"):
            texts.append("model_id: the transcoder does not name its language model: set it to the model's id there")
        if named and config.model_layers is None:
            texts.append(
                f"model_layers: the transcoder is of layers {list(named)} of its language model: set it to how many "
                "layers that has"
            )
        elif named and config.model_layers is not None and config.model_layers <= max(named):
            texts.append(
                f"model_layers: {config.model_layers}, but the transcoder is of layers {list(named)} of its language "
                "model, counted from 0: set it to how many layers that has"
            )
        return texts


def layers(collected: Collected) -> list[int]:
    """The number in the language model of each layer of the transcoder."""
    named = (collected.info.model or {}).get("layers")
    return list(named) if named else list(range(collected.info.n_layers))


class Shown:
    """What Neuronpedia is told of a store."""

    def __init__(self, collected: Collected, config: NeuronpediaConfig, model: str):
        self.collected, self.config, self.model = collected, config, model
        tokens = collected.vocabulary.token.tolist()
        # Neuronpedia shows tokens one by one: a part of an emoji is the sign for no character. Its database has no NUL.
        text = (piece.decode("utf-8", "replace").replace("\x00", "\ufffd") for piece in collected.spell(tokens))
        self._text = dict(zip(tokens, text, strict=True))

    def belongs(self, source: str, facts: Facts) -> dict[str, Row]:
        """The lines that each stand in a file of their own, by the file's name."""
        config, info = self.config, self.collected.info
        about = config.description or f"Cross-layer transcoder {facts.name}".strip()
        release = config.release or config.source_set
        return {
            "release": release_row(config, release, about),
            "model": model_row(config, self.model, config.model_layers or info.n_layers),
            "sourceset": source_set_row(config, self.model, release, about),
            "source": source_row(config, self.model, source, info, facts),
        }

    def feature(self, layer: int, feature: int, source: str) -> Row:
        arrays = self.collected.layer(layer)
        edges = np.asarray(self.collected.info.edges)
        counts = arrays["histogram"][feature]
        filled = np.flatnonzero(counts)
        bins = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0)
        columns: Row = {
            "maxActApprox": exact([float(arrays["maximum"][feature])])[0],
            "frac_nonzero": int(arrays["active"][feature]) / max(1, self.collected.info.tokens),
            "freq_hist_data_bar_heights": counts[bins].tolist(),
            # The middle of each bin, as they are spaced.
            "freq_hist_data_bar_values": [float(f"{x:.6g}") for x in np.sqrt(edges[:-1] * edges[1:])[bins]],
        }
        if "logits_up_id" in arrays:
            for ours, theirs in (("up", "pos"), ("down", "neg")):
                ids, values = (arrays[f"logits_{ours}_{what}"][feature, -1] for what in ("id", "value"))
                there = ids >= 0
                columns[f"{theirs}_str"] = [self._text[one] for one in ids[there].tolist()]
                columns[f"{theirs}_values"] = exact(values[there].tolist())
        if "similar" in arrays:
            # Neuronpedia compares features of one source, which is a layer.
            size = self.collected.info.n_features
            similar, cosines = arrays["similar"][feature], arrays["similar_cosine"][feature]
            own = (similar >= 0) & (similar // size == layer)
            columns["topkCosSimIndices"] = (similar[own] % size).tolist()
            columns["topkCosSimValues"] = exact(cosines[own].tolist())
        return feature_row(self.config, self.model, source, feature) | columns

    def activations(self, layer: int, feature: int, source: str) -> Iterable[Row]:
        examples = self.collected.examples(layer, feature)
        edges = exact(self.collected.layer(layer)["group_edge"][feature].tolist())
        number = 0
        for example in examples.top:
            yield self._activation(example, source, feature, number, (TOP, edges[0], TOP))
            number += 1
        for group, inside in enumerate(examples.groups):
            interval = edges[group + 1], edges[group], 1 / len(examples.groups)
            for example in inside:
                yield self._activation(example, source, feature, number, interval)
                number += 1

    def _activation(
        self, example: FeatureExample, source: str, feature: int, number: int, interval: tuple[float, float, float]
    ) -> Row:
        values = exact(example.values.tolist())
        largest = max(values)
        low, high, share = interval
        name = f"{self.model}/{source}/{feature}/{number}"
        row: Activation = {
            "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24],
            "modelId": self.model,
            "layer": source,
            "index": str(feature),
            "creatorId": self.config.creator_id,
            "tokens": [self._text[token] for token in self.collected.ids[example.start : example.stop].tolist()],
            "values": values,
            "maxValue": largest,
            "maxValueTokenIndex": values.index(largest),
            "minValue": min(values),
            "binMin": low,
            "binMax": high,
            "binContains": share,
            "qualifyingTokenIndex": example.row - example.start,
        }
        return dict(row)


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n" for row in rows)
