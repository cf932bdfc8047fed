"""A recipe, typed: the engine's own tables, and one field for each slot."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import attrs
from attrs import Attribute, Factory, field, frozen, validators

from clt_plugins.contract.slots import BY_TABLE, SLOTS, Slot
from clt_plugins.contract.spec import FREE_ON_RESUME, Selected
from clt_plugins.contract.types import HubOrPath
from clt_plugins.errors import Refused

positive: Any = validators.gt(0)
not_negative: Any = validators.ge(0)


def _one_slot(_: Any, attribute: Attribute[Any], value: str | None) -> None:
    if value is not None and value.count("{}") != 1:
        raise ValueError(f"'{attribute.name}' must hold one {{}} where the layer's number goes: {value!r}")


def _ascending(_: Any, attribute: Attribute[Any], value: list[int] | None) -> None:
    if value is not None and (not value or value[0] < 0 or any(a >= b for a, b in pairwise(value))):
        raise ValueError(f"'{attribute.name}' must be at least one number >= 0, ascending: {value}")


@frozen(kw_only=True)
class ModelConfig:
    """The language model whose MLPs are transcribed; not needed by sources that run no model."""

    path: HubOrPath = field(metadata={"example": "openai-community/gpt2"})
    """A folder with a Hugging Face model, or a hub id."""
    gguf_file: str | None = None
    """The GGUF file in that folder or repository, where the model is one."""
    tokenizer: HubOrPath | None = None
    """A tokenizer from elsewhere than `path`."""
    revision: str | None = None
    """The hub's revision: a branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type the model runs in."""
    device: str = field(default="auto", metadata=FREE_ON_RESUME)
    """Where the model runs; "auto" is the GPU where there is one."""
    inputs: str | None = field(default=None, validator=_one_slot)
    """The module whose input the transcoder reads, such as `transformer.h.{}.mlp`; what the MLPs read if not given."""
    outputs: str | None = field(default=None, validator=_one_slot)
    """The module whose output it predicts, such as `transformer.h.{}.mlp`; what the MLPs add to the residual stream if
    not given."""
    layers: list[int] | None = field(default=None, validator=_ascending)
    """Which layers are transcribed; all if not given."""


@frozen(kw_only=True)
class TranscoderConfig:
    """The transcoder's size and arithmetic."""

    features: int = field(validator=positive, metadata={"example": 4096})
    """F: features per layer."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """The type of the parameters."""
    device: str = field(default="auto", metadata=FREE_ON_RESUME)
    """Where the transcoder lives; "auto" is the GPU where there is one."""
    path: Literal["auto", "sparse", "dense"] = field(default="auto", metadata=FREE_ON_RESUME)
    """Sparse products, matrix products, or by measured density."""


@frozen(kw_only=True)
class TrainConfig:
    """The training loop. What goes by the size of a run is set when it is not given, and written into its recipe.toml;
    examples/README.md has the measurements behind these rules."""

    steps: int = field(validator=positive, metadata={"example": 10000})
    """Optimizer steps."""
    schedule_steps: int | None = field(default=None, validator=validators.optional(positive))
    """Steps over which all that falls or rises does so: the learning rate, k, weights of losses. Then it stays. `steps`
    if not given; a run resumed with other `steps` keeps what it had."""
    batch_tokens: int = field(default=4096, validator=positive)
    """B: tokens in a batch, of all ranks together."""
    statistics_tokens: int = field(default=65536, validator=positive)
    """Tokens that statistics for the normalisation are estimated from before the first step, where the source does not
    store them; they are trained on as well."""
    lr: float | None = field(default=None, validator=validators.optional(positive))
    """Learning rate at its highest; 0.25 / sqrt(features of all layers together) if not given."""
    clip_norm: float | None = field(default=None, validator=validators.optional(positive))
    """Gradients are scaled down to this 2-norm; not clipped if not given."""
    precision: Literal["fp32", "tf32", "bf16", "fp8"] = "fp32"
    """The type of the encoder's matrix product; values and gradients are float32 in any case. `tf32` and `fp8` are for
    GPUs that have it. With weights in bfloat16 (`transcoder.dtype`) the product is never wider than they are."""
    log_every: int = field(default=50, validator=positive, metadata=FREE_ON_RESUME)
    """Steps between lines of the log."""
    eval_every: int = field(default=500, validator=positive, metadata=FREE_ON_RESUME)
    """Steps between evaluations on held-out tokens; the last step is always evaluated."""
    eval_tokens: int = field(default=16384, validator=positive, metadata=FREE_ON_RESUME)
    """Held-out tokens per evaluation."""
    checkpoint_every: int = field(default=500, validator=positive, metadata=FREE_ON_RESUME)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = field(default=2, validator=positive, metadata=FREE_ON_RESUME)
    """How many checkpoints are kept, the newest."""
    dead_after_tokens: int = field(
        default=Factory(lambda self: max(1, min(1_000_000, self.steps * self.batch_tokens // 20)), takes_self=True),
        validator=positive,
    )
    """A feature that was not active for this many tokens counts as dead; if not given, a twentieth of the run's tokens,
    at most a million."""


def _range(_: Any, attribute: Attribute[Any], value: list[float]) -> None:
    if len(value) != 2 or not 0 < value[0] < value[1]:
        raise ValueError(f"'{attribute.name}' must be two positive numbers, ascending: {value}")


def _positive_numbers(_: Any, attribute: Attribute[Any], value: float | list[float]) -> None:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"'{attribute.name}' must be > 0, for every layer: {value}")


@frozen(kw_only=True)
class ConvertConfig:
    """After training: thresholds in place of a selection by rank (TopK, BatchTopK), at the same L0 in every layer."""

    activation: str = "jumprelu"
    """The activation that takes the thresholds."""
    thresholds: Literal["feature", "cut", "layer"] = "feature"
    """The thresholds before calibration: of each feature, the mean over batches of its smallest selected
    pre-activation; one per layer, the mean of the smallest of all its features; or one per layer in standardised units
    (the reference library's, for transcoders that rank so)."""
    tokens: int = field(default=65536, validator=positive)
    """Training tokens that the thresholds are estimated from."""
    unseen: float | None = field(default=None, validator=validators.optional(positive))
    """Threshold of features never selected among those; the mean of their layer's if not given."""
    calibrate: bool = True
    """Scale each layer's thresholds until its L0 is the target."""
    calibration_tokens: int = field(default=16384, validator=positive)
    """Held-out tokens to calibrate on; as many others, not calibrated on, are reported on."""
    l0: float | list[float] | None = field(default=None, validator=validators.optional(_positive_numbers))
    """The target L0, per layer; that of the trained transcoder if not given."""
    tolerance: float = field(default=0.005, validator=positive)
    """How far a layer's L0 may be from the target after calibration, as a share of it."""
    scales: list[float] = field(factory=lambda: [0.01, 100.0], validator=_range)
    """The smallest and largest factor that is tried."""

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
            raise Refused("convert.l0", text)
        if max(targets) > n_features:
            raise Refused("convert.l0", f"{max(targets):g} is more than the {n_features} features of a layer")
        return targets


@frozen(kw_only=True)
class EvaluateConfig:
    """After training (and conversion): the transcoder judged on held-out text, alone and inside the language model."""

    tokens: int = field(default=65536, validator=positive)
    """Held-out tokens for statistics."""
    model_tokens: int | None = field(default=None, validator=validators.optional(not_negative))
    """Held-out tokens read by the language model with the transcoder in the place of its MLPs; 0 leaves this out. If
    not given: 16384, or none where the source has no language model."""
    dense_above: float = field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    """A feature that is active at more than this share of tokens is ultra-dense."""


def _as_folder(_: Any, attribute: Attribute[Any], value: str) -> None:
    if not value.replace("-", "a").replace(".", "a").replace("_", "a").isalnum() or value.startswith("."):
        raise ValueError(f"'{attribute.name}' must be letters, digits, '-', '_' and '.', to name a folder: {value!r}")


def _one_or_more(_: Any, attribute: Attribute[Any], value: list[Selected]) -> None:
    if not value:
        raise ValueError(f"'{attribute.name}' must have at least one {BY_TABLE[attribute.name].kind}")


def _field(slot: Slot) -> Any:
    """The recipe's field for a slot. Its default is written in the metadata as a recipe writes it, by name."""
    stated = {"example": slot.example} if slot.default is None else {"default": slot.default}
    kind: Any = Annotated[Selected, slot.table]
    validator = _one_or_more if slot.needs_one else None
    return field(type=list[kind] if slot.many else kind, validator=validator, metadata=stated)


def _with_slots(_: type, fields: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """The class's own fields, and those of all slots, each after the table that it names."""
    added = attrs.make_class("Slots", {slot.table: _field(slot) for slot in SLOTS}, kw_only=True)
    by_name = {a.name: a for a in attrs.fields(added)}
    out = [a.evolve(inherited=False) for a in fields]
    for slot in SLOTS:
        index = next(number for number, a in enumerate(out) if a.name == slot.after)
        out.insert(index + 1, by_name[slot.table])
    return out


@frozen(kw_only=True, field_transformer=_with_slots)
class Recipe:
    """What to train, on what, and how; `clt_plugins plugins` describes every table.

    Besides the fields below it has one for each slot, called as its table: a `Selected`, or a list of them where a
    recipe has `[[table]]`.
    """

    name: str = field(validator=_as_folder, metadata={"example": "my-transcoder"})
    """What the run is called; its folder is below `runs/<name>/`."""
    seed: int = field(default=0, validator=[validators.ge(0), validators.lt(2**63)])
    """Every random number comes from it."""
    requires: list[str] = field(factory=list)
    """Distributions that must be installed, such as `clt-gated>=1.0`."""
    model: ModelConfig | None = None
    """The language model."""
    transcoder: TranscoderConfig
    """The transcoder's size and arithmetic."""
    train: TrainConfig
    """The training loop."""
    convert: ConvertConfig | None = field(default=None, metadata={"example": None})
    """After training, TopK or BatchTopK is replaced by thresholds; without this table it is not."""
    evaluate: EvaluateConfig | None = field(default=None, metadata={"example": None})
    """After that, the transcoder is evaluated on held-out text and inside the language model; without this table it is
    not."""

    if TYPE_CHECKING:
        # The slots' fields, which a type checker does not see.
        def __getattr__(self, table: str) -> Any: ...

    def selected(self) -> list[tuple[str, Selected]]:
        """All choices with their paths: `activation`, `losses[1]`; after each those in its settings,
        `losses[1].schedule`."""
        return [found for slot in SLOTS for found in _selected(getattr(self, slot.table), slot.table)]


def _selected(value: Any, path: str) -> Iterator[tuple[str, Selected]]:
    """The choices in a value, each with its path, an outer one before those in it."""
    if isinstance(value, Selected):
        yield path, value
        yield from _selected(value.config, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _selected(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _selected(item, f"{path}.{key}")
    elif attrs.has(type(value)):
        for a in attrs.fields(type(value)):
            yield from _selected(getattr(value, a.name), f"{path}.{a.alias}")
