"""Stages: convert, evaluate, export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import Attribute, field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Refused, Selected, Spec, default_choice, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe

_positive: Any = validators.gt(0)


def _every() -> Any:
    return field(default=None, validator=validators.optional(_positive), metadata=FREE_ON_RESUME)


def _range(_: Any, attribute: Attribute[Any], value: list[float]) -> None:
    if len(value) != 2 or not 0 < value[0] < value[1]:
        raise ValueError(f"'{attribute.name}' must be two positive numbers, ascending: {value}")


def _positive_numbers(_: Any, attribute: Attribute[Any], value: float | list[float]) -> None:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"'{attribute.name}' must be > 0, for every layer: {value}")


@frozen(kw_only=True)
class ConvertConfig:
    """Thresholds in place of a selection by rank (TopK, BatchTopK), at the same L0 in every layer; later stages get the
    converted transcoder."""

    activation: Annotated[Selected, "activation"] = default_choice("jumprelu")
    """The activation that takes the thresholds."""
    thresholds: Literal["feature", "cut", "layer"] = "feature"
    """The thresholds before calibration: of each feature, the mean over batches of its smallest selected
    pre-activation; one per layer, the mean of the smallest of all its features; or one per layer in standardised units
    (crosslayer-coding's, for transcoders that rank so)."""
    tokens: int = field(default=65536, validator=_positive)
    """Training tokens that the thresholds are estimated from."""
    unseen: float | None = field(default=None, validator=validators.optional(_positive))
    """Threshold of features never selected among those; the mean of their layer's if not given (of all layers' in
    a layer of which none was selected)."""
    calibrate: bool = True
    """Scale each layer's thresholds until its L0 is the target."""
    calibration_tokens: int = field(default=16384, validator=_positive)
    """Held-out tokens to calibrate on; as many others, not calibrated on, are reported on."""
    l0: float | list[float] | None = field(default=None, validator=validators.optional(_positive_numbers))
    """The target L0, per layer; that of the trained transcoder if not given."""
    tolerance: float = field(default=0.005, validator=_positive)
    """How far a layer's L0 may be from the target after calibration, as a share of it."""
    scales: list[float] = field(factory=lambda: [0.01, 100.0], validator=_range)
    """The smallest and largest factor that is tried."""
    every: int | None = _every()
    """Also every so many steps during training, on checkpoints."""

    def targets(self, n_layers: int, n_features: int) -> list[float] | None:
        """The target L0 of each layer; None if it is that of the trained transcoder.

        Raises:
            Refused: there are more or fewer layers, or a layer has not as many features.
        """
        if self.l0 is None:
            return None
        targets = self.l0 if isinstance(self.l0, list) else [self.l0] * n_layers
        if len(targets) != n_layers:
            text = f"{len(targets)} numbers for {n_layers} layers: give one for each, or one for all"
            raise Refused("stages.convert.l0", text)
        if max(targets) > n_features:
            raise Refused("stages.convert.l0", f"{max(targets):g} is more than the {n_features} features of a layer")
        return targets


@frozen(kw_only=True)
class EvaluateConfig:
    """The transcoder judged on held-out text, alone and inside the language model."""

    tokens: int = field(default=65536, validator=_positive)
    """Held-out tokens for statistics."""
    model_tokens: int | None = field(default=None, validator=validators.optional(validators.ge(0)))
    """Held-out tokens read by the language model with the transcoder in the place of its MLPs; 0 leaves this out. If
    not given: 16384, or none where the source has no language model."""
    dense_above: float = field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    """A feature that is active at more than this share of tokens is ultra-dense."""
    folder: str = "evaluation"
    """The folder of the report; a second evaluation in one recipe (before a conversion, say) needs another."""
    every: int | None = _every()
    """Also every so many steps during training, on checkpoints."""


@frozen(kw_only=True)
class ExportConfig:
    """The transcoder written in another tool's format."""

    format: Annotated[Selected, "exports"] = field(metadata={"example": "circuit-tracer"})
    """Which format, with its settings."""
    folder: str | None = None
    """The folder in `exports/`; the format's name if not given."""
    every: int | None = _every()
    """Also every so many steps during training, on checkpoints."""


def build_convert(config: ConvertConfig, context: Context) -> Any:
    from clt_stages.stages import Convert

    return Convert(config)


def build_evaluate(config: EvaluateConfig, context: Context) -> Any:
    from clt_stages.stages import Evaluate

    return Evaluate(config)


def build_export(config: ExportConfig, context: Context) -> Any:
    from clt_stages.stages import Export

    return Export(config, context)


@hookimpl
def clt_stages() -> list[Spec]:
    return [
        Spec("convert", ConvertConfig, build_convert),
        Spec("evaluate", EvaluateConfig, build_evaluate),
        Spec("export", ExportConfig, build_export),
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """Targets of a conversion that do not fit. Where [model] does not say how many layers there are, the source does
    when it is built."""
    layers = recipe.model.layers if recipe.model is not None else None
    faults = []
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage.config, ConvertConfig):
            l0 = stage.config.l0 if isinstance(stage.config.l0, list) else [stage.config.l0]
            try:
                stage.config.targets(len(layers or l0), recipe.transcoder.features)
            except Refused as refused:
                faults.append(f"stages[{index}].l0: {refused.faults[0].text}")
    return faults
