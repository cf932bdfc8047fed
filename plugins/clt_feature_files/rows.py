"""The rows of Neuronpedia's tables that its bulk import takes: a line of JSON each, columns by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from clt_feature_files import NeuronpediaConfig
    from clt_plugins import CollectionInfo, Facts

Row = dict[str, Any]
"""The columns of a row that are not left to their defaults."""


class Activation(TypedDict):
    """A row of the table of activations: a text in which a feature is active."""

    id: str
    """25 letters and digits, the first a letter; no other row has them."""
    modelId: str
    """The language model."""
    layer: str
    """The source: layer and source set."""
    index: str
    """The feature's number in the source."""
    creatorId: str
    """The user that owns it."""
    tokens: list[str]
    """The text."""
    values: list[float]
    """The feature's value at each of them."""
    maxValue: float
    """The largest of these."""
    maxValueTokenIndex: int
    """Which token has it first."""
    minValue: float
    """The smallest of these."""
    binMin: float
    """The lower end of the interval that the example was drawn from; -1 of the strongest examples."""
    binMax: float
    """The upper end of the interval; of the strongest examples the largest value."""
    binContains: float
    """The share of active values in the interval; -1 of the strongest examples."""
    qualifyingTokenIndex: int
    """Which token the example was chosen for."""


def feature_row(config: NeuronpediaConfig, model: str, source: str, feature: int) -> Row:
    """What names a feature."""
    return {
        "modelId": model,
        "layer": source,
        "index": str(feature),
        "creatorId": config.creator_id,
        "sourceSetName": config.source_set,
        "hasVector": False,
    }


def release_row(config: NeuronpediaConfig, name: str, description: str) -> Row:
    """What source sets are published together as."""
    return {
        "name": name,
        "description": description,
        "descriptionShort": description,
        "creatorName": config.creator,
        "creatorNameShort": config.creator,
        "creatorId": config.creator_id,
        "urls": [config.url] if config.url else [],
        "visibility": "PUBLIC",
    }


def model_row(config: NeuronpediaConfig, model: str, n_layers: int) -> Row:
    """The language model, for a Neuronpedia that does not have it."""
    return {
        "id": model,
        "displayName": model,
        "displayNameShort": model,
        "creatorId": config.creator_id,
        "owner": config.creator,
        "layers": n_layers,
        "neuronsPerLayer": 0,
        "visibility": "PUBLIC",
    }


def source_set_row(config: NeuronpediaConfig, model: str, release: str, description: str) -> Row:
    """The transcoder: a source for each layer."""
    return {
        "modelId": model,
        "name": config.source_set,
        "description": description,
        "creatorName": config.creator,
        "creatorId": config.creator_id,
        "releaseName": release,
        "type": "cross-layer-transcoder",
        "urls": [config.url] if config.url else [],
        "hasDashboards": True,
        "visibility": "PUBLIC",
    }


def source_row(config: NeuronpediaConfig, model: str, source: str, info: CollectionInfo, facts: Facts) -> Row:
    """The features of a layer."""
    row: Row = {
        "id": source,
        "modelId": model,
        "setName": config.source_set,
        "creatorId": config.creator_id,
        "hasDashboards": True,
        "visibility": "PUBLIC",
        "num_prompts": info.contexts,
        "num_tokens_in_prompt": round(info.tokens / max(1, info.contexts)),
        "dataset": facts.recipe.get("source", {}).get("text"),
        "hfRepoId": config.weights or None,
    }
    return {column: value for column, value in row.items() if value is not None}
