"""Where a model's MLPs are read: found by structure, or named by a path with `{}` for the layer.

By default a transcoder reads what goes into the module called `mlp` (or alike) of every layer and predicts what comes
out of it, before it is added to the residual stream. Gemma 2 and 3 normalise once more in between, outside the module;
to predict that, set `outputs = "model.layers.{}.post_feedforward_layernorm"`.
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
"""What a layer's MLP is called: `mlp` in GPT-2, GPT-NeoX, Llama, Gemma, Qwen and Mistral; the others elsewhere."""


@attrs.frozen
class Site:
    """One place in the model: what a module reads, or what it writes."""

    path: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.path}.{self.side}"


def find_sites(
    model: PreTrainedModel, inputs: str | None, outputs: str | None, layers: Sequence[int] | None
) -> list[tuple[Site, Site]]:
    """The (input, output) sites of the wanted layers.

    Args:
        inputs: path template of what the transcoder reads, such as "transformer.h.{}.mlp": that module's input;
            with ".input" or ".output" at the end, that side of it. None finds the MLPs.
        outputs: path template of what it predicts; without a side, the module's output.
        layers: the wanted layers, ascending; None for all.

    Raises:
        ValueError: no such module or layer, or no MLPs to be found; the message lists what is there.
    """
    found = _mlp_template(model) if not (inputs and outputs) else ""
    templates = inputs or found, outputs or found
    count = min(_count(model, template, key) for template, key in zip(templates, ("inputs", "outputs"), strict=True))
    wanted = list(range(count)) if layers is None else list(layers)
    if wanted != sorted(set(wanted)) or not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise Refused("model.layers", f"expected ascending numbers below {count}, got {wanted}")
    return [(_site(model, templates[0], n, "input"), _site(model, templates[1], n, "output")) for n in wanted]


def _mlp_template(model: PreTrainedModel) -> str:
    """The path of the MLPs: one in each element of the list of as many layers as the config says."""
    layers = model.config.get_text_config().num_hidden_layers
    stacks = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    found = []
    for path, stack in stacks.items():
        name = next((name for name in MLP_NAMES if all(hasattr(layer, name) for layer in stack)), None)
        if name is not None and len(stack) == layers:
            found.append(f"{path}.{{}}.{name}")
    if len(found) == 1:
        return found[0]
    if found:
        raise Refused(
            "model.inputs", f"several stacks of MLPs ({', '.join(found)}): set model.inputs and model.outputs"
        )
    there = "; ".join(f"{path}.{{}} has {_children(stack[0])}" for path, stack in stacks.items()) or "no layers at all"
    raise Refused(
        "model.inputs",
        f"found no MLPs in {type(model).__name__} ({there}): set model.inputs and model.outputs "
        f"to paths with {{}} for the layer",
    )


def _count(model: PreTrainedModel, template: str, key: str) -> int:
    """How many layers a template has."""
    if template.count("{}") != 1:
        raise Refused(f"model.{key}", f'expected one {{}} for the layer, as in "model.layers.{{}}.mlp": {template!r}')
    count = 0
    while _module_and_side(model, template.format(count)) is not None:
        count += 1
    if not count:
        raise Refused(f"model.{key}", f"{_missing(model, template.format(0))}")
    return count


def _site(model: PreTrainedModel, template: str, layer: int, side: Literal["input", "output"]) -> Site:
    found = _module_and_side(model, template.format(layer))
    assert found is not None
    return Site(found[0], found[1] or side)


def _module_and_side(model: PreTrainedModel, path: str) -> tuple[str, Any] | None:
    """A module's path, and the side that the given path names, if any; None if there is no such module."""
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
    """What is there instead of a path."""
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
    return ", ".join(names) or "no modules in it"
