"""What the formats cannot hold: said of a recipe, of a transcoder before it is trained, and of one to be written.

Each fault is a text `setting: what is wrong: remedy`; a setting without a table is one of the export's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_exporters.hooks import input_hook, layer_numbers, model_name, output_hook
from clt_plugins import recipe_data

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder

BY_RANK = ("topk", "batchtopk")


@frozen(kw_only=True)
class Subject:
    """What is to be exported, as far as it is known."""

    activation: str
    """The name of what makes the features, converted if they are to be."""
    ranking: Any
    """The settings of a built-in selection by rank; else None."""
    by_rank: bool
    skip: bool
    offsets: bool
    """Whether something is yet to be learned for each target layer that is added to active features."""
    model: Mapping[str, Any]
    """The language model, as in `[model]`."""

    @classmethod
    def of_recipe(cls, recipe: Any) -> Subject:
        """What the recipe's transcoder will be, as far as built-in choices go."""
        model = recipe_data(recipe).get("model", {})
        name = recipe.activation.name if recipe.convert is None else recipe.convert.activation
        return cls(
            activation=name,
            ranking=recipe.activation.config if name in BY_RANK and recipe.convert is None else None,
            by_rank=name in BY_RANK,
            skip=bool(getattr(recipe.tying.config, "skip", False)),
            offsets=_learns_offsets(recipe.tying.config, len(model.get("layers", ())) or None),
            model=model,
        )

    @classmethod
    def of(cls, transcoder: CrossLayerTranscoder, *, trained: bool) -> Subject:
        """A transcoder. Of a trained one the values say which offsets it has."""
        activation, tying = (transcoder.choices[slot] for slot in ("activation", "tying"))
        return cls(
            activation=activation.name,
            ranking=activation.config if activation.name in BY_RANK else None,
            by_rank=not hasattr(transcoder.activation, "threshold"),
            skip=getattr(transcoder.tying, "skip", None) is not None,
            offsets=not trained and _learns_offsets(tying.config, transcoder.n_layers),
            model=transcoder.model_described(),
        )


def _learns_offsets(config: Any, layers: int | None) -> bool:
    """Where there is one layer there is one target, whose offset folds into the encoder."""
    return bool(getattr(config, "feature_offset", False)) and layers != 1


def refuse(faults: list[str]) -> None:
    """Raises:
    ValueError: if there is a fault; a line for each.
    """
    if faults:
        raise ValueError("\n".join(faults))


def circuit_tracer(config: Any, subject: Subject) -> list[str]:
    """Faults of a circuit-tracer folder."""
    faults = plain("circuit-tracer", subject)
    if subject.skip:
        faults.append(
            "tying.skip: circuit-tracer folders hold no skip path, and without it the outputs would be wrong: "
            "train with tying.skip = false to export"
        )
    faults += _named(config, subject.model)
    layers = subject.model.get("layers")
    if layers and layer_numbers(len(layers), subject.model) != list(range(len(layers))):
        faults.append(
            f"model.layers: circuit-tracer numbers a folder's layers from 0, and these are {layers}: "
            "train on all layers to export"
        )
    return faults


def saelens(config: Any, subject: Subject) -> list[str]:
    """Faults of SAELens folders."""
    return [*plain("saelens", subject), *_named(config, subject.model)]


def plain(format_name: str, subject: Subject) -> list[str]:
    """Faults of anything that holds thresholds and decoder rows."""
    faults = []
    if subject.by_rank:
        faults.append(
            f"activation: {subject.activation} selects features by rank, and {format_name} holds thresholds only: "
            "convert it first (`convert`, or a table [convert] in the recipe)"
        )
    if subject.offsets:
        faults.append(
            f"tying.feature_offset: is learned for each target layer, which the decoder rows of {format_name} cannot "
            "hold: train without it to export"
        )
    return faults


def crosslayer_coding(config: Any, subject: Subject) -> list[str]:
    """Faults of a checkpoint of crosslayer-coding."""
    faults = _said(lambda: model_name(config.model_name, subject.model))
    if config.tl_input_template is None:
        faults += _said(lambda: input_hook(None, subject.model))
    faults += _said(lambda: output_hook(None, subject.model))
    if subject.activation not in ("relu", "jumprelu", *BY_RANK):
        faults.append(f"activation: crosslayer-coding has no {subject.activation!r}: convert it first")
    if subject.ranking is not None and (subject.ranking.ranking, subject.ranking.scope) != ("zscore", "global"):
        faults.append(
            "activation: crosslayer-coding ranks standardised pre-activations of all layers together "
            '(ranking = "zscore", scope = "global"), and would select other features than this '
            f'(ranking = "{subject.ranking.ranking}", scope = "{subject.ranking.scope}"): convert it first'
        )
    return faults


def _named(config: Any, model: Mapping[str, Any]) -> list[str]:
    return _said(
        lambda: model_name(config.model_name, model),
        lambda: input_hook(config.input_hook, model),
        lambda: output_hook(config.output_hook, model),
    )


def _said(*lookups: Callable[[], object]) -> list[str]:
    """What look-ups that fail say."""
    faults = []
    for look_up in lookups:
        try:
            look_up()
        except ValueError as error:
            faults.append(str(error))
    return faults
