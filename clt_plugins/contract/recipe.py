"""A recipe, typed: the engine's own tables, and one field for each slot."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import attrs
from attrs import Attribute, Factory, field, frozen, validators

from clt_plugins.contract.slots import BY_TABLE, OF_RECIPE, Slot
from clt_plugins.contract.spec import FREE_ON_RESUME, Selected
from clt_plugins.contract.types import HubOrPath, recipe_key

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
    from_: HubOrPath | None = field(default=None, metadata=FREE_ON_RESUME)
    """Begin with the weights of another transcoder: a run, a transcoder's folder, or another tool's. It may have fewer
    features and layers, another activation, and a tying that this one holds exactly."""
    statistics: Literal["kept", "new"] = "kept"
    """The normalisation's statistics with `from`: those of that transcoder where it has the same [normalisation], or
    new ones of this run's activations. The weights are converted to new ones, so that the function stays."""
    freeze: list[Literal["encoder", "decoder", "bias", "threshold"]] = Factory(list)
    """Weights that are not trained, by role."""


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
    """Learning rate at its highest. If not given, 0.25 / sqrt(features of all layers together); in runs of more than
    600 steps, that times sqrt(600 / steps)."""
    clip_norm: float | None = field(default=None, validator=validators.optional(positive))
    """Gradients are scaled down to this 2-norm; not clipped if not given."""
    precision: Literal["fp32", "tf32", "bf16", "fp8"] = "fp32"
    """The type of the encoder's matrix product; values and gradients are float32 in any case. `tf32` and `fp8` are for
    GPUs that have it. With weights in bfloat16 (`transcoder.dtype`) the product is never wider than they are. While the
    transcoder runs dense, and with a loss that reads all pre-activations, it has the weights' type."""
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
    added = attrs.make_class("Slots", {slot.table: _field(slot) for slot in OF_RECIPE}, kw_only=True)
    by_name = {a.name: a for a in attrs.fields(added)}
    out = [a.evolve(inherited=False) for a in fields]
    for slot in OF_RECIPE:
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
    data_seed: int | None = field(default=None, validator=validators.optional([validators.ge(0), validators.lt(2**63)]))
    """What the source and the transforms draw from instead, such as the order of the text. With it, runs of different
    seeds read the same data in the same order, and a sweep of seeds reads them once."""
    requires: list[str] = field(factory=list)
    """Distributions that must be installed, such as `clt-gated>=1.0`."""
    model: ModelConfig | None = None
    """The language model."""
    transcoder: TranscoderConfig
    """The transcoder's size and arithmetic."""
    train: TrainConfig
    """The training loop."""

    if TYPE_CHECKING:
        # The slots' fields, which a type checker does not see.
        def __getattr__(self, table: str) -> Any: ...

    @property
    def seed_of_data(self) -> int:
        """What the source and the transforms draw from."""
        return self.seed if self.data_seed is None else self.data_seed

    def selected(self) -> list[tuple[str, Selected]]:
        """All choices with their paths: `activation`, `losses[1]`; after each those in its settings,
        `losses[1].schedule`."""
        return [found for slot in OF_RECIPE for found in _selected(getattr(self, slot.table), slot.table)]


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
            yield from _selected(getattr(value, a.name), f"{path}.{recipe_key(a)}")
