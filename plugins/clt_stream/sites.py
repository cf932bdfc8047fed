"""Where a model is read: at its MLPs, or at modules that the recipe names by a path with `{}` for the layer.

By default a transcoder reads the input of the module `mlp` (see `MLP_NAMES`) of every layer, and predicts its output,
before that is added to the residual stream. Gemma 2 and 3 normalise the output once more, outside the module; to
predict the normalised output, set `outputs = "model.layers.{}.post_feedforward_layernorm"`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch import nn

from clt_plugins import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of a layer's MLP: `mlp` in GPT-2, GPT-NeoX, Llama, Gemma, Qwen and Mistral; the others in other families."""


@attrs.frozen
class Site:
    """A module's input or output."""

    path: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.path}.{self.side}"


def find_sites(
    model: PreTrainedModel, inputs: str | None, outputs: str | None, layers: Sequence[int] | None
) -> list[tuple[Site, Site]]:
    """The sites of the chosen layers: for each layer, what the transcoder reads and what it predicts.

    Args:
        inputs: the path of the module that the transcoder reads, such as "transformer.h.{}.mlp": the module's input,
            unless the path ends in ".output". None finds the MLPs.
        outputs: the same for what it predicts: the module's output, unless the path ends in ".input".
        layers: the chosen layers, ascending; None for all.

    Raises:
        Refused: there is no such module or layer, or no MLP was found; the message lists what the model has.
    """
    mlp = _mlp_template(model) if not (inputs and outputs) else ""
    templates = inputs or mlp, outputs or mlp
    count = min(_count(model, template, key) for template, key in zip(templates, ("inputs", "outputs"), strict=True))
    chosen = list(range(count)) if layers is None else list(layers)
    if chosen != sorted(set(chosen)) or not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise Refused("model.layers", f"expected ascending numbers below {count}, got {chosen}")
    return [(_site(model, templates[0], n, "input"), _site(model, templates[1], n, "output")) for n in chosen]


def _mlp_template(model: PreTrainedModel) -> str:
    """The path of the MLPs: each element of a list of modules, as long as the config says, has one."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    templates = []
    for path, stack in stacks.items():
        name = next((name for name in MLP_NAMES if all(hasattr(layer, name) for layer in stack)), None)
        if name is not None and len(stack) == n_layers:
            templates.append(f"{path}.{{}}.{name}")
    if len(templates) == 1:
        return templates[0]
    if templates:
        raise Refused(
            "model.inputs", f"several stacks of MLPs ({', '.join(templates)}): set model.inputs and model.outputs"
        )
    present = (
        "; ".join(f"{path}.{{}} has {_children(stack[0])}" for path, stack in stacks.items()) or "no layers at all"
    )
    raise Refused(
        "model.inputs",
        f"found no MLPs in {type(model).__name__} ({present}): set model.inputs and model.outputs "
        f"to paths with {{}} for the layer",
    )


def _count(model: PreTrainedModel, template: str, key: str) -> int:
    """How many layers have a module at the path of a template.

    Args:
        key: the setting of `[model]` that holds the template.
    """
    if template.count("{}") != 1:
        raise Refused(f"model.{key}", f'expected one {{}} for the layer, as in "model.layers.{{}}.mlp": {template!r}')
    count = 0
    while _module_and_side(model, template.format(count)) is not None:
        count += 1
    if not count:
        raise Refused(f"model.{key}", _missing(model, template.format(0)))
    return count


def _site(model: PreTrainedModel, template: str, layer: int, side: Literal["input", "output"]) -> Site:
    module = _module_and_side(model, template.format(layer))
    assert module is not None, "_count has found every layer"
    return Site(module[0], module[1] or side)


def _module_and_side(model: PreTrainedModel, path: str) -> tuple[str, Any] | None:
    """The module's path, and the side that `path` ends in or None; None if there is no such module."""
    if _get(model, path) is not None:
        return path, None
    match = re.fullmatch(r"(.+)\.(input|output)", path)
    if match and _get(model, match[1]) is not None:
        return match[1], match[2]
    return None


def _get(model: PreTrainedModel, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _missing(model: PreTrainedModel, path: str) -> str:
    """That there is no such path, and what there is instead."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        parent = _get(model, ".".join(parts[:length]))
        if parent is not None:
            return f"no module {path!r}; {'.'.join(parts[:length])!r} has {_children(parent)}"
    return f"no module {path!r}; {type(model).__name__} has {_children(model)}"


def _children(module: nn.Module) -> str:
    names = [name for name, _ in module.named_children()]
    if isinstance(module, nn.ModuleList):
        return f"elements 0 to {len(names) - 1}"
    return ", ".join(names) or "no modules inside"
