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
    own_layer: bool
    """Whether features write to their own layer only."""
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
        n_layers = len(model.get("layers", ())) or None
        return cls(
            activation=activation,
            thresholded=activation not in WITHOUT_THRESHOLDS,
            skip=bool(getattr(recipe.tying.config, "skip", False)),
            offsets=_learns_offsets(recipe.tying.config, n_layers),
            own_layer=_own_layer(recipe.tying.name, n_layers),
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
            own_layer=_own_layer(transcoder.choices["tying"].name, transcoder.n_layers),
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


def _own_layer(tying: str, n_layers: int | None) -> bool:
    """Whether a tying writes to a feature's own layer only. With one layer there is no other."""
    return tying == "per_layer" or n_layers == 1


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
                "circuit-tracer folders hold no skip path, and without it the outputs would be wrong: export "
                "gemma-scope-2, which circuit-tracer reads too, or train with tying.skip = false",
            )
        )
    return faults + _names(config, subject.model) + _first_layers("circuit-tracer", subject.model)


def gemma_scope_2(config: Any, subject: Subject) -> list[Fault]:
    """Faults of files as those of Gemma Scope 2."""
    faults = plain("gemma-scope-2", subject) + _names(config, subject.model)
    return faults + _first_layers("gemma-scope-2", subject.model)


def transcoder_set(config: Any, subject: Subject) -> list[Fault]:
    """Faults of a transcoder set."""
    faults = plain("transcoder-set", subject)
    if not subject.own_layer:
        faults.append(
            Fault(
                ("tying",),
                "its features write to later layers too, and those of a transcoder-set only to their own: export "
                "circuit-tracer, or train with the tying per_layer",
            )
        )
    return faults + _names(config, subject.model) + _first_layers("transcoder-set", subject.model)


def _first_layers(format_name: str, model: Mapping[str, Any]) -> list[Fault]:
    """Formats that number their layers from 0 can hold only a language model's first ones."""
    layers = model.get("layers")
    if not layers or layer_numbers(len(layers), model) == list(range(len(layers))):
        return []
    text = f"{format_name} numbers a folder's layers from 0, and these are {layers}: train on all layers to export"
    return [Fault(("model", "layers"), text)]


def saelens(config: Any, subject: Subject) -> list[Fault]:
    """Faults of SAELens folders."""
    return [*plain("saelens", subject), *_names(config, subject.model)]


def saedashboard(config: Any, subject: Subject) -> list[Fault]:
    """Faults of a folder for SAEDashboard."""
    faults = plain("saedashboard", subject)
    if subject.skip:
        text = "SAEDashboard reads no skip path: export saelens, or train with tying.skip = false"
        faults.append(Fault(("tying", "skip"), text))
    return faults + _names(config, subject.model) + _first_layers("saedashboard", subject.model)


def saebench(config: Any, subject: Subject) -> list[Fault]:
    """Faults of folders for SAEBench."""
    faults = plain("saebench", subject)
    if subject.skip:
        text = (
            "SAEBench's decode has no inputs, which a skip path reads: export saelens, or train with tying.skip = false"
        )
        faults.append(Fault(("tying", "skip"), text))
    return faults + _names(config, subject.model)


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
