"""Formats of other tools: circuit-tracer, saelens, crosslayer-coding, safetensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


def _one_slot(_: Any, attribute: Any, value: str | None) -> None:
    if value is not None and value.count("{}") != 1:
        raise ValueError(f"'{attribute.name}' must hold one {{}} where the layer's number goes: {value!r}")


@frozen(kw_only=True)
class CircuitTracerConfig:
    """A folder that circuit-tracer loads as a cross-layer transcoder; it is read back by `CrossLayerTranscoder.load`.

    Normalisation, scales and offsets shared by all targets are folded into the weights; tied decoders are expanded.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""
    model_name: str | None = None
    """What circuit-tracer calls the language model; that of the recipe if not given."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block ("mlp.hook_in", "hook_resid_mid"); derived from
    the recipe's model.inputs if not given."""
    output_hook: str | None = None
    """Where features write ("mlp.hook_out", "hook_mlp_out"); derived from the recipe's model.outputs if not given."""
    scan: str | None = None
    """Names the set of features for its user interface; the folder if not given."""


@frozen(kw_only=True)
class SAELensConfig:
    """A folder per layer that SAELens loads as a transcoder: the features of that layer, and what they write to it.

    What they write to later layers has no place in the format, and is left out.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""
    model_name: str | None = None
    """What SAELens calls the language model; that of the recipe if not given."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block; derived from the recipe's model.inputs if not
    given."""
    output_hook: str | None = None
    """Where features write; derived from the recipe's model.outputs if not given."""


@frozen(kw_only=True)
class CrosslayerCodingConfig:
    """A checkpoint of the library crosslayer-coding: `model.safetensors`, `cfg.json` and, where activations are
    normalised, `norm_stats.json`, as SAEDashboard reads them; it is read back by `CrossLayerTranscoder.load`."""

    model_name: str | None = None
    """The language model's name; that of the recipe if not given."""
    tl_input_template: str | None = field(default=None, validator=_one_slot)
    """The TransformerLens hook of the inputs, such as "blocks.{}.mlp.hook_in"; derived from the recipe's model.inputs
    if not given."""


@frozen(kw_only=True)
class SafetensorsConfig:
    """One plain file `clt.safetensors` that works on raw activations: `W_enc` [L, F, D], `b_enc` [L, F], `b_dec`
    [L, D], `W_dec.SS` [F, L - s, D] for each source layer s, and `threshold` [L, F] or `W_skip` [L, D, D] if any."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""


def build_circuit_tracer(config: CircuitTracerConfig, context: Context | None = None) -> Any:
    from clt_exporters.circuit_tracer import CircuitTracer

    return CircuitTracer(config)


def build_saelens(config: SAELensConfig, context: Context | None = None) -> Any:
    from clt_exporters.saelens import SAELens

    return SAELens(config)


def build_crosslayer_coding(config: CrosslayerCodingConfig, context: Context | None = None) -> Any:
    from clt_exporters.crosslayer import CrosslayerCoding

    return CrosslayerCoding(config)


def build_safetensors(config: SafetensorsConfig, context: Context | None = None) -> Any:
    from clt_exporters.plain import Safetensors

    return Safetensors(config)


@hookimpl
def clt_exporters() -> list[Spec]:
    return [
        Spec(
            "circuit-tracer",
            CircuitTracerConfig,
            build_circuit_tracer,
            reader=lambda: build_circuit_tracer(CircuitTracerConfig()),
        ),
        Spec("saelens", SAELensConfig, build_saelens),
        Spec(
            "crosslayer-coding",
            CrosslayerCodingConfig,
            build_crosslayer_coding,
            aliases=("crosslayer_coding",),
            reader=lambda: build_crosslayer_coding(CrosslayerCodingConfig()),
        ),
        Spec("safetensors", SafetensorsConfig, build_safetensors),
    ]


@hookimpl
def clt_check(recipe: Any) -> list[str]:
    """What the recipe alone tells of the formats' limits; exporters' `check` sees the rest."""
    from clt_exporters import limits

    subject = limits.Subject.of_recipe(recipe)
    rules: dict[str, Callable[[Any, Any], list[str]]] = {
        "circuit-tracer": limits.circuit_tracer,
        "saelens": limits.saelens,
        "crosslayer-coding": limits.crosslayer_coding,
        "safetensors": lambda _, subject: limits.plain("safetensors", subject),
    }
    return [
        f"exports[{index}]: {fault}"
        for index, export in enumerate(recipe.exports)
        for fault in (rules[export.name](export.config, subject) if export.name in rules else ())
    ]
