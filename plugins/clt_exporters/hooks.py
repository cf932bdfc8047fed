"""Names for other tools: of the language model, and of its hooks in TransformerLens.

The recipe names modules of Hugging Face. In every family an MLP reads what TransformerLens calls `mlp.hook_in`, writes
`mlp.hook_out`, and adds `hook_mlp_out` to the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_plugins import Refused

PATHS = ("/", "./", "../", "~")
"""How a path begins that is no id of a hub, whether there is something or not."""

MLP = ("mlp.hook_in", "mlp.hook_out")
# A normalisation before the MLP: what it writes is what the MLP reads.
BEFORE = ("hook_resid_mid", "mlp.hook_in")
AFTER = (None, "hook_mlp_out")
HOOKS: dict[str, tuple[str | None, str | None]] = {
    "mlp": MLP,
    "feed_forward": MLP,
    "ffn": MLP,
    "block_sparse_moe": MLP,
    "ln_2": BEFORE,
    "post_attention_layernorm": BEFORE,
    "pre_feedforward_layernorm": BEFORE,
    "post_feedforward_layernorm": AFTER,
}
"""For each module within a block: TransformerLens's hook at its input and at its output; None where it has none."""


def model_name(setting: str | None, model: Mapping[str, Any]) -> str:
    """The language model's name: the export's setting, else that of the recipe; of a folder of this disk its last part.

    Raises:
        Refused: neither is known; or the setting is a path, which says nothing to others.
    """
    if setting and setting.startswith(PATHS):
        raise Refused("model_name", f"{setting!r} is a path of this disk: give the name by which others know the model")
    name = setting or portable(model).get("path")
    if not name:
        raise Refused("model_name", "not known from a [model]: set it to the name of the language model")
    return str(name)


def portable(model: Mapping[str, Any]) -> dict[str, Any]:
    """The table `[model]` without the author's folders: a path on this disk is cut to its last part."""
    return {key: _last_part(value) if key in ("path", "tokenizer") and value else value for key, value in model.items()}


def _last_part(name: str) -> str:
    path = Path(name)
    return path.resolve().name if name.startswith(PATHS) or path.exists() else name


def input_hook(setting: str | None, model: Mapping[str, Any]) -> str:
    """The hook, within a block, of what the transcoder reads: the export's setting, else the hook that the folder of
    another tool named, else from `model.inputs`.

    Raises:
        Refused: the hook of the recipe's module is not known.
    """
    return setting or _stated("input", model) or _hook("input", model.get("inputs"))


def output_hook(setting: str | None, model: Mapping[str, Any]) -> str:
    """The hook, within a block, of what the transcoder reconstructs; as `input_hook`.

    Raises:
        Refused: the hook of the recipe's module is not known.
    """
    return setting or _stated("output", model) or _hook("output", model.get("outputs"))


def lens_hook(hook: str) -> str:
    """A hook that TransformerLens itself has: `mlp.hook_in` is circuit-tracer's own.

    With LayerNorm, `ln2.hook_normalized` is the same, in a model that was loaded without processing. With RMSNorm it is
    not yet multiplied by the norm's weight: there is no such hook, and the export must name another.
    """
    return "ln2.hook_normalized" if hook == "mlp.hook_in" else hook


def _stated(side: str, model: Mapping[str, Any]) -> str | None:
    """The hook that the folder of another tool named."""
    hooks = model.get("hooks")
    name = hooks.get(side) if isinstance(hooks, Mapping) else None
    return name if isinstance(name, str) else None


def _hook(side: str, template: str | None) -> str:
    """The hook for a module such as `transformer.h.{}.mlp`, which may end in `.input` or `.output`."""
    if template is None and side == "output":
        return "hook_mlp_out"  # what the MLP adds to the residual: after the norm, where one follows the MLP
    parts = ["mlp"] if template is None else template.split(".")
    end = parts.pop() if parts[-1] in ("input", "output") else side
    hook = HOOKS.get(parts[-1], (None, None))[0 if end == "input" else 1] if parts else None
    if hook == "hook_resid_mid" and parts[0] == "gpt_neox":
        hook = None  # attention and MLP are parallel there, and TransformerLens has no such hook
    if hook is None:
        raise Refused(
            f"{side}_hook", f"the TransformerLens name for model.{side}s = {template!r} is not known: set {side}_hook"
        )
    return hook


def layer_numbers(n_layers: int, model: Mapping[str, Any]) -> list[int]:
    """The language model's numbers of the transcribed layers."""
    return list(model.get("layers") or range(n_layers))
