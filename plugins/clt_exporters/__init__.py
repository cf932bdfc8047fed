"""Formats of other tools: circuit-tracer, gemma-scope-2, saebench, saedashboard, saelens, safetensors, transcoder-set;
and formats that are only read: bytedance, clt-forge, clt-training, llamascopium."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from clt_plugins import Format, Spec, hookimpl

if TYPE_CHECKING:
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
class TranscoderSetConfig:
    """A folder that circuit-tracer loads as a set of transcoders, one for each layer (PLT), skip path included;
    `CrossLayerTranscoder.load` reads it back. For features that write to their own layer only: the tying `per_layer`.
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
    scan: str | None = None
    """The name of this set of features in circuit-tracer's user interface; the folder's name if not given."""


@frozen(kw_only=True)
class GemmaScope2Config:
    """Files as Gemma Scope 2 has them, which circuit-tracer loads as a cross-layer transcoder with its skip path;
    `CrossLayerTranscoder.load` reads them back. They are twice as large as a circuit-tracer folder: decoders have rows
    of zeros for earlier layers.
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
    scan: str | None = None
    """The name of this set of features in circuit-tracer's user interface; the folder's name if not given."""


@frozen(kw_only=True)
class SAEDashboardConfig:
    """A folder that SAEDashboard opens with `use_clt`, whatever the tying: decoders are expanded and normalisation is
    folded into them. It shows what features write to their own layer."""

    model_name: str | None = None
    """The language model's name; that of the recipe if not given (of a local folder its last part)."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block; derived from the recipe's model.inputs if not
    given. `mlp.hook_in`, which only circuit-tracer has, becomes `ln2.hook_normalized`: the same in a model with
    LayerNorm that is loaded without processing, and not with RMSNorm."""
    output_hook: str | None = None
    """Where features write; derived from the recipe's model.outputs if not given."""


@frozen(kw_only=True)
class SAEBenchConfig:
    """A folder per layer that SAEBench judges as a custom SAE, with the Python file that loads it: that layer's
    features, and what they write to that layer, scaled to rows of norm 1."""

    model_name: str | None = None
    """The language model's name; that of the recipe if not given (of a local folder its last part)."""
    input_hook: str | None = None
    """Where features read, as TransformerLens names it within a block; derived from the recipe's model.inputs if not
    given. `mlp.hook_in`, which only circuit-tracer has, becomes `ln2.hook_normalized`: the same in a model with
    LayerNorm that is loaded without processing, and not with RMSNorm."""
    output_hook: str | None = None
    """Where features write; derived from the recipe's model.outputs if not given."""


@frozen(kw_only=True)
class SAELensConfig:
    """A folder per layer that SAELens loads as a transcoder: that layer's features, and what they write to that layer.

    The format cannot hold what features write to later layers; it is left out. (SAELens's own loader of cross-layer
    transcoders sums what a feature writes to all layers, and ignores thresholds.)
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
    [L, D], `W_dec.SS` [F, L - s, D] for each source layer s, and `threshold` [L, F] or `W_skip` [L, D, D] if any.
    `CrossLayerTranscoder.load` reads it back."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights."""


def build_circuit_tracer(config: CircuitTracerConfig, context: Context | None = None) -> Any:
    from clt_exporters.circuit_tracer.clt import CircuitTracer

    return CircuitTracer(config)


def build_transcoder_set(config: TranscoderSetConfig, context: Context | None = None) -> Any:
    from clt_exporters.circuit_tracer.transcoder_set import TranscoderSet

    return TranscoderSet(config)


def build_gemma_scope_2(config: GemmaScope2Config, context: Context | None = None) -> Any:
    from clt_exporters.circuit_tracer.gemma_scope_2 import GemmaScope2

    return GemmaScope2(config)


def build_saelens(config: SAELensConfig, context: Context | None = None) -> Any:
    from clt_exporters.saelens.write import SAELens

    return SAELens(config)


def build_saedashboard(config: SAEDashboardConfig, context: Context) -> Any:
    from clt_exporters.saelens.dashboard import SAEDashboard

    return SAEDashboard(config)


def build_saebench(config: SAEBenchConfig, context: Context) -> Any:
    from clt_exporters.saelens.bench import SAEBench

    return SAEBench(config)


def build_safetensors(config: SafetensorsConfig, context: Context | None = None) -> Any:
    from clt_exporters.plain import Safetensors

    return Safetensors(config)


@hookimpl
def clt_exporters() -> list[Spec]:
    return [
        _read_back("circuit-tracer", CircuitTracerConfig, build_circuit_tracer),
        _read_back("gemma-scope-2", GemmaScope2Config, build_gemma_scope_2),
        Spec("saebench", SAEBenchConfig, build_saebench),
        Spec("saedashboard", SAEDashboardConfig, build_saedashboard),
        # What it writes of a cross-layer transcoder is only a part: so it is no format that reads back (`clt_formats`).
        Spec("saelens", SAELensConfig, build_saelens),
        _read_back("safetensors", SafetensorsConfig, build_safetensors),
        _read_back("transcoder-set", TranscoderSetConfig, build_transcoder_set),
    ]


def _read_back(name: str, config: type, build: Callable[..., Any]) -> Spec:
    """An exporter that reads its format too."""
    return Spec(name, config, build, reader=lambda: build(config()))


@hookimpl
def clt_formats() -> list[Format]:
    """A new format that is only read is one entry here, and a class with `recognises` and `read`."""
    return [
        Format(
            "bytedance",
            "Folders of ByteDance's cross-layer transcoders: TopK by activation x decoder norm, no biases.",
            _class("circuit_tracer.bytedance", "ByteDance"),
        ),
        Format(
            "clt-forge",
            "Checkpoints of CLT-Forge, of one rank or several, with cross-layer decoders or without.",
            _class("trainers.clt_forge", "CLTForge"),
        ),
        Format(
            "clt-training",
            "Folders of EleutherAI's clt-training and sparsify: TopK transcoders, cross-layer or of a layer each.",
            _class("trainers.clt_training", "CLTTraining"),
        ),
        Format(
            "llamascopium",
            "Checkpoints of OpenMOSS's llamascopium: cross-layer transcoders.",
            _class("trainers.llamascopium", "Llamascopium"),
        ),
        Format(
            "saelens",
            "Transcoders of SAELens, of one layer or a folder for each: plain, skip, JumpReLU.",
            lambda: build_saelens(SAELensConfig()),
        ),
    ]


def _class(module: str, name: str) -> Callable[[], Any]:
    """A class of this package, imported when it is made."""
    return lambda: getattr(import_module(f"clt_exporters.{module}"), name)()


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """The limits of the formats that the recipe alone shows; the exporters' `check` sees the rest."""
    from clt_exporters import limits

    rules: dict[type, Callable[[Any, limits.Subject], list[Fault]]] = {
        CircuitTracerConfig: limits.circuit_tracer,
        GemmaScope2Config: limits.gemma_scope_2,
        SAEBenchConfig: limits.saebench,
        SAEDashboardConfig: limits.saedashboard,
        SAELensConfig: limits.saelens,
        SafetensorsConfig: lambda _, subject: limits.plain("safetensors", subject),
        TranscoderSetConfig: limits.transcoder_set,
    }
    faults, subject = [], limits.Subject.of_recipe(recipe, recipe.activation.name)
    for path, chosen in recipe.selected():
        if path.startswith("stages[") and chosen.choice.slot == "activation":
            # A conversion: what comes after it gets another activation.
            subject = limits.Subject.of_recipe(recipe, chosen.name)
        elif (rule := rules.get(type(chosen.config))) is not None:
            faults += [f"{path}: {fault}" for fault in rule(chosen.config, subject)]
    return faults
