"""Where a transcoder reads and writes, in the names of TransformerLens; and what its language model is called.

A module `mlp` of Hugging Face reads what TransformerLens calls `mlp.hook_in`, and writes `mlp.hook_out`, in every
family; the normalisation before it reads `hook_resid_mid`, and Gemma's normalisation after it writes `hook_mlp_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clt_plugins import Refused

MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
BEFORE = ("ln_2", "post_attention_layernorm", "pre_feedforward_layernorm")
AFTER = ("post_feedforward_layernorm",)


def model_name(wanted: str | None, model: Mapping[str, Any]) -> str:
    """The language model's name.

    Raises:
        ValueError: neither is known.
    """
    name = wanted or model.get("path")
    if not name:
        raise Refused("model_name", "not known from a [model]: set it to the name of the language model")
    return str(name)


def input_hook(wanted: str | None, model: Mapping[str, Any]) -> str:
    """The hook, within a block, of what the transcoder reads.

    Raises:
        ValueError: the recipe's module has no known counterpart.
    """
    return wanted or _hook("inputs", "input", model)


def output_hook(wanted: str | None, model: Mapping[str, Any]) -> str:
    """The hook, within a block, of what the transcoder reconstructs.

    Raises:
        ValueError: the recipe's module has no known counterpart.
    """
    return wanted or _hook("outputs", "output", model)


def _hook(key: str, side: str, model: Mapping[str, Any]) -> str:
    template = model.get(key)
    if template is None:
        return "mlp.hook_in" if side == "input" else "mlp.hook_out"
    *path, last = template.split(".")
    if last in ("input", "output"):
        side, last = last, path[-1]
    if last in MLPS:
        return "mlp.hook_in" if side == "input" else "mlp.hook_out"
    if last in BEFORE:
        # After the normalisation's weight is what the MLP reads.
        return "hook_resid_mid" if side == "input" else "mlp.hook_in"
    if last in AFTER and side == "output":
        return "hook_mlp_out"
    raise Refused(f"{side}_hook", f"TransformerLens's name for model.{key} = {template!r} is not known here: give it")


def layer_numbers(layers: int, model: Mapping[str, Any]) -> list[int]:
    """The language model's numbers of the transcribed layers."""
    return list(model.get("layers") or range(layers))
