"""Exporters: circuit-tracer, saelens, safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from clt_plugins import Context, Fault, Recipe


@frozen(kw_only=True)
class CircuitTracerConfig:
    """A folder that circuit-tracer loads as a cross-layer transcoder; `CrossLayerTranscoder.load` reads it back.

    Normalisation, scales and offsets shared by all targets are folded into the weights; tied decoders are expanded.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""
    model_name: str | None = None
    """The language model's name; that of the recipe if not given (of a local folder its last part)."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block ("mlp.hook_in", "hook_resid_mid"); derived from
    the recipe's model.inputs if not given."""
    output_hook: str | None = None
    """Where features write ("mlp.hook_out", "hook_mlp_out"); derived from the recipe's model.outputs if not given."""
    scan: str | None = None
    """The name of this set of features in circuit-tracer's user interface; the folder's name if not given."""


@frozen(kw_only=True)
class SAELensConfig:
    """A folder per layer that SAELens loads as a transcoder: that layer's features, and what they write to that layer.

    The format cannot hold what features write to later layers; it is left out.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""
    model_name: str | None = None
    """The language model's name; that of the recipe if not given (of a local folder its last part)."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block; derived from the recipe's model.inputs if not
    given."""
    output_hook: str | None = None
    """Where features write; derived from the recipe's model.outputs if not given."""


@frozen(kw_only=True)
class SafetensorsConfig:
    """One plain file `clt.safetensors` that works on raw activations: `W_enc` [L, F, D], `b_enc` [L, F], `b_dec`
    [L, D], `W_dec.SS` [F, L - s, D] for each source layer s, and `threshold` [L, F] or `W_skip` [L, D, D] if any."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""


def build_circuit_tracer(config: CircuitTracerConfig, context: Context | None = None) -> Any:
    from clt_exporters.circuit_tracer import CircuitTracer

    return CircuitTracer(config)


def build_saelens(config: SAELensConfig, context: Context) -> Any:
    from clt_exporters.saelens import SAELens

    return SAELens(config)


def build_safetensors(config: SafetensorsConfig, context: Context) -> Any:
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
        Spec("safetensors", SafetensorsConfig, build_safetensors),
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """The limits of the formats that the recipe alone shows; the exporters' `check` sees the rest."""
    from clt_exporters import limits

    rules: dict[type, Callable[[Any, limits.Subject], list[Fault]]] = {
        CircuitTracerConfig: limits.circuit_tracer,
        SAELensConfig: limits.saelens,
        SafetensorsConfig: lambda _, subject: limits.plain("safetensors", subject),
    }
    faults, subject = [], limits.Subject.of_recipe(recipe, recipe.activation.name)
    for path, chosen in recipe.selected():
        if path.startswith("stages[") and chosen.choice.slot == "activation":
            # A conversion: what comes after it gets another activation.
            subject = limits.Subject.of_recipe(recipe, chosen.name)
        elif (rule := rules.get(type(chosen.config))) is not None:
            faults += [f"{path}: {fault}" for fault in rule(chosen.config, subject)]
    return faults
