"""Collected features as files of other tools: circuit-tracer's local features, single features for a graph, and
Neuronpedia's bulk import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import Attribute, field, frozen, validators

from clt_plugins import FREE_TEXT, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context

_positive: Any = validators.gt(0)


def _some(_: Any, attribute: Attribute[Any], value: list[Path]) -> None:
    if not value:
        raise ValueError(f"'{attribute.name}' must name at least one graph, a JSON file of circuit-tracer")


@frozen(kw_only=True)
class CircuitTracerConfig:
    """All features for circuit-tracer's own page: `index.json.gz`, and a file per layer that is read by byte range.
    `serve(data_dir=..., features_dir=FOLDER)` shows them beside graphs whose `scan` begins with "/"."""

    bins: int = field(default=50, validator=_positive)
    """Bins of each histogram. The page needs bins of equal width: the store's counts are spread evenly over them."""


@frozen(kw_only=True)
class FeatureJsonConfig:
    """A JSON file for each feature of some graphs, for a web server: Neuronpedia reads it by the graph's
    `feature_json_base_url`."""

    graphs: list[Path] = field(validator=_some, metadata={"example": ["graph.json"]})
    """Attribution graphs: JSON files of circuit-tracer, such as those of the stage `circuits`."""
    bins: int = field(default=50, validator=_positive)
    """Bins of each histogram."""


@frozen(kw_only=True)
class NeuronpediaConfig:
    """Neuronpedia's bulk import: `MODEL/LAYER-SOURCE_SET/` with batches of features and activations."""

    source_set: str = field(default="clt", validator=validators.matches_re(r"[a-z0-9][a-z0-9.-]*"))
    """The name of this transcoder there: "clt-16k". The source of layer 3 is then "3-clt-16k"."""
    model_id: str | None = field(
        default=None, validator=validators.optional(validators.matches_re(r"[A-Za-z0-9][A-Za-z0-9_.-]*"))
    )
    """The language model's id there; the last part of the model's name if not given."""
    model_layers: int | None = field(default=None, validator=validators.optional(_positive))
    """How many layers the language model has; only needed where `model.layers` names those of the transcoder."""
    release: str | None = None
    """The name of the release that the source set belongs to; that of the source set if not given."""
    description: str = field(default="", metadata=FREE_TEXT)
    """A line for the release's page; made from the run if empty."""
    creator: str = field(default="", metadata=FREE_TEXT)
    """Who made it: a name for people."""
    creator_id: str = "unknown"
    """The id of a user of that Neuronpedia, who will own it."""
    url: str = field(default="", metadata=FREE_TEXT)
    """Where to read more of it."""
    weights: str = ""
    """The repository on the model hub that has the weights."""
    batch: int = field(default=256, validator=_positive)
    """Features in a file."""


def build_circuit_tracer(config: CircuitTracerConfig, context: Context) -> Any:
    from clt_feature_files.circuit_tracer import CircuitTracer

    return CircuitTracer(config)


def build_feature_json(config: FeatureJsonConfig, context: Context) -> Any:
    from clt_feature_files.feature_json import FeatureJson

    return FeatureJson(config)


def build_neuronpedia(config: NeuronpediaConfig, context: Context) -> Any:
    from clt_feature_files.neuronpedia import Neuronpedia

    return Neuronpedia(config)


@hookimpl
def clt_reports() -> list[Spec]:
    return [
        Spec("circuit-tracer", CircuitTracerConfig, build_circuit_tracer),
        Spec("feature-json", FeatureJsonConfig, build_feature_json),
        Spec("neuronpedia", NeuronpediaConfig, build_neuronpedia),
    ]
