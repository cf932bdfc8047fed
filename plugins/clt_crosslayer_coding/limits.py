"""What a checkpoint of crosslayer-coding cannot hold, and the names it needs. This module must not import torch.

A fault without a table, such as `model_name`, is about a setting of the export itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins import Fault, Refused, recipe_data

if TYPE_CHECKING:
    from clt_crosslayer_coding import ExportConfig
    from clt_plugins import CrossLayerTranscoder, Recipe, Selected

TOPK = ("topk", "batchtopk")
ACTIVATIONS = ("relu", "jumprelu", *TOPK)
"""All that the library has."""
RANKING = {"ranking": "zscore", "scope": "global"}
"""How its TopK and BatchTopK select."""

MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
NORMALISATIONS = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm")
"""Modules before the MLP: what they write is what the MLP reads."""
HOOKS: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(MLPS, ("mlp.hook_in", "mlp.hook_out")),
    **dict.fromkeys(NORMALISATIONS, ("hook_resid_mid", "mlp.hook_in")),
    "post_feedforward_layernorm": (None, "hook_mlp_out"),
}
"""For each module of Hugging Face within a block: TransformerLens's hook at its input and at its output."""


def of_recipe(config: ExportConfig, recipe: Recipe, activation: Selected) -> list[Fault]:
    """Faults of the transcoder that a recipe describes, as far as built-in choices tell.

    Args:
        activation: after conversion, if there is one before the export.
    """
    return _faults(config, recipe_data(recipe).get("model", {}), activation.name, activation.config)


def of_transcoder(config: ExportConfig, transcoder: CrossLayerTranscoder) -> list[Fault]:
    """Faults of a transcoder, trained or not."""
    activation = transcoder.choices["activation"]
    faults = _faults(config, transcoder.model_described(), activation.name, activation.config)
    try:
        transcoder.encoder.expand(0, transcoder.tying)  # a layer stands for all
        folding = transcoder.normaliser.fold()
    except Refused as refused:
        return faults + refused.faults
    if not (folding.inputs.diagonal and folding.targets.diagonal):
        name = transcoder.choices["normalisation"].name
        text = (
            f"{name} mixes dimensions, and crosslayer-coding has a mean and a deviation for each: "
            'choose another, such as "mean_std", or another format'
        )
        faults.append(Fault(("normalisation",), text))
    return faults


def _faults(config: ExportConfig, model: Mapping[str, Any], activation: str, settings: Any) -> list[Fault]:
    lookups: list[Callable[[], str]] = [lambda: model_name(config, model), lambda: hook("output", model)]
    if config.tl_input_template is None:
        lookups.insert(1, lambda: hook("input", model))
    faults: list[Fault] = []
    for look_up in lookups:
        try:
            look_up()
        except Refused as refused:
            faults += refused.faults
    if activation not in ACTIVATIONS:
        faults.append(Fault(("activation",), f"crosslayer-coding has no {activation!r}: convert it first"))
    elif activation in TOPK and settings is not None:
        chosen = {name: getattr(settings, name, None) for name in RANKING}
        if chosen != RANKING:
            faults.append(
                Fault(
                    ("activation",),
                    f"crosslayer-coding selects with {_spell(RANKING)}, and would select other features than "
                    f"{_spell(chosen)}: convert it first",
                )
            )
    return faults


def _spell(settings: Mapping[str, Any]) -> str:
    return ", ".join(f'{name} = "{value}"' for name, value in settings.items())


PATHS = ("/", "./", "../", "~")
"""How a path begins that is no id of a hub."""


def model_name(config: ExportConfig, model: Mapping[str, Any]) -> str:
    """The language model's name: the export's setting, else that of the recipe; of a local folder its last part.

    Raises:
        Refused: neither is known; or the setting is a path, which says nothing to others.
    """
    if config.model_name is not None and config.model_name.startswith(PATHS):
        text = f"{config.model_name!r} is a path of this disk: give the name by which others know the model"
        raise Refused("model_name", text)
    name = config.model_name or model.get("path")
    if not name:
        raise Refused("model_name", "not known from a [model]: set it to the name of the language model")
    path = Path(name)
    local = config.model_name is None and (str(name).startswith(PATHS) or path.exists())
    return path.resolve().name if local else str(name)


def hook(side: str, model: Mapping[str, Any]) -> str:
    """The TransformerLens hook, within a block, of what the transcoder reads ("input") or reconstructs ("output").

    Raises:
        Refused: the hook of the recipe's module is not known.
    """
    template = model.get(f"{side}s")
    if template is None and side == "output":
        return "hook_mlp_out"  # what the MLP adds to the residual: after the norm, where one follows the MLP
    parts = ["mlp"] if template is None else template.split(".")
    end = parts.pop() if parts[-1] in ("input", "output") else side
    name = HOOKS.get(parts[-1], (None, None))[0 if end == "input" else 1] if parts else None
    if name == "hook_resid_mid" and parts[0] == "gpt_neox":
        name = None  # attention and MLP are parallel there, and TransformerLens has no such hook
    if name is None:
        remedy = "set tl_input_template" if side == "input" else "choose another module to export"
        raise Refused(f"model.{side}s", f"the TransformerLens name of {template!r} is not known: {remedy}")
    return name
