"""What the formats cannot hold, asked three times: of a recipe, of an untrained transcoder, and of one to be exported.

A fault without a table, such as `model_name`, is about a setting of the export itself. This module must not import
torch: `validate` runs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_exporters.hooks import input_hook, layer_numbers, model_name, output_hook
from clt_plugins import Fault, Faults, Refused, Thresholded, recipe_data

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder, Recipe

WITHOUT_THRESHOLDS = ("topk", "batchtopk", "groupmax")
"""The built-in activations that are not `Thresholded`. A recipe only names its activation; the object, which can be
asked itself, is not built yet."""


@frozen(kw_only=True)
class Subject:
    """What is to be exported, as far as it is known."""

    activation: str
    """The name of the activation: after conversion, if there is one."""
    thresholded: bool
    """Whether the activation is `Thresholded`; true of a recipe's third-party activation, which is not known yet."""
    skip: bool
    """Whether there is a skip path."""
    offsets: bool
    """Whether training will learn offsets that differ between target layers."""
    model: Mapping[str, Any]
    """The language model, as in `[model]`."""
    unfolded: tuple[Fault, ...] = ()
    """Why normalisation and encoder are no matrix and bias on raw inputs; empty if that is not known yet."""

    @classmethod
    def of_recipe(cls, recipe: Recipe, activation: str) -> Subject:
        """The transcoder that a recipe describes, as far as built-in choices tell.

        Args:
            activation: after conversion, if there is one before the export.
        """
        model = recipe_data(recipe).get("model", {})
        return cls(
            activation=activation,
            thresholded=activation not in WITHOUT_THRESHOLDS,
            skip=bool(getattr(recipe.tying.config, "skip", False)),
            offsets=_learns_offsets(recipe.tying.config, len(model.get("layers", ())) or None),
            model=model,
        )

    @classmethod
    def of(cls, transcoder: CrossLayerTranscoder, *, trained: bool) -> Subject:
        """A transcoder.

        Args:
            trained: its offsets have their final values, and are judged by `Folded`.
        """
        tying = transcoder.choices["tying"].config
        return cls(
            activation=transcoder.choices["activation"].name,
            thresholded=isinstance(transcoder.activation, Thresholded),
            skip=getattr(transcoder.tying, "skip", None) is not None,
            offsets=not trained and _learns_offsets(tying, transcoder.n_layers),
            model=transcoder.model_described(),
            unfolded=_unfolded(transcoder),
        )


def _unfolded(transcoder: CrossLayerTranscoder) -> tuple[Fault, ...]:
    """Why a transcoder's normalisation and encoder cannot be folded into a matrix and a bias."""
    try:
        transcoder.encoder.expand(0, transcoder.tying)  # a layer stands for all
        transcoder.normaliser.fold()
    except Faults as refused:
        return tuple(refused.faults)
    return ()


def _learns_offsets(config: Any, n_layers: int | None) -> bool:
    """Whether a tying learns offsets for several targets. With one layer there is one target: its offset folds."""
    return bool(getattr(config, "feature_offset", False)) and n_layers != 1


def refuse(faults: list[Fault]) -> None:
    """Stop an export.

    Raises:
        Faults: there is at least one fault.
    """
    if faults:
        raise Faults(faults)


def circuit_tracer(config: Any, subject: Subject) -> list[Fault]:
    """Faults of a circuit-tracer folder."""
    faults = plain("circuit-tracer", subject)
    if subject.skip:
        faults.append(
            Fault(
                ("tying", "skip"),
                "circuit-tracer folders hold no skip path, and without it the outputs would be wrong: "
                "train with tying.skip = false to export",
            )
        )
    faults += _names(config, subject.model)
    layers = subject.model.get("layers")
    if layers and layer_numbers(len(layers), subject.model) != list(range(len(layers))):
        faults.append(
            Fault(
                ("model", "layers"),
                f"circuit-tracer numbers a folder's layers from 0, and these are {layers}: "
                "train on all layers to export",
            )
        )
    return faults


def saelens(config: Any, subject: Subject) -> list[Fault]:
    """Faults of SAELens folders."""
    return [*plain("saelens", subject), *_names(config, subject.model)]


def plain(format_name: str, subject: Subject) -> list[Fault]:
    """Faults of every format that holds only thresholds and decoder rows."""
    faults = list(subject.unfolded)
    if not subject.thresholded:
        faults.append(
            Fault(
                ("activation",),
                f"{subject.activation} has no thresholds, and {format_name} needs them: "
                "convert it first (`convert`, or a stage `convert` before it in the recipe)",
            )
        )
    if subject.offsets:
        faults.append(
            Fault(
                ("tying", "feature_offset"),
                "training learns an offset for each target layer, which the decoder rows of "
                f"{format_name} cannot hold: train without it to export",
            )
        )
    return faults


def _names(config: Any, model: Mapping[str, Any]) -> list[Fault]:
    """Faults of the names of the model and its hooks."""
    lookups: tuple[Callable[[], str], ...] = (
        lambda: model_name(config.model_name, model),
        lambda: input_hook(config.input_hook, model),
        lambda: output_hook(config.output_hook, model),
    )
    faults: list[Fault] = []
    for look_up in lookups:
        try:
            look_up()
        except Refused as refused:
            faults += refused.faults
    return faults
