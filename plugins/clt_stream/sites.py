"""Where a model is read: where its MLPs read and what they add to the residual, or where the recipe says.

A transcoder predicts what the MLP of a layer adds to the residual stream. `probe` finds that by trying the layers, not
by names: the module `mlp` in most models, the last norm of a layer in Gemma 2, `mlp.dense_4h_to_h` in BLOOM. A layer
without such a place is refused, with the remedy. Modules that the recipe names by a path with `{}` for the layer are
read as named, and tried as well: if they are something else, a warning says what.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from clt_plugins import Refused
from clt_stream.finite import check_finite
from clt_stream.probe import Layer, Result
from clt_stream.taps import Site, few_tokens, run_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def find_sites(
    model: PreTrainedModel, inputs: str | None, outputs: str | None, layers: Sequence[int] | None
) -> list[tuple[Site, Site]]:
    """The sites of the chosen layers: for each layer, what the transcoder reads and what it predicts.

    One forward pass of ten tokens, in which each chosen layer runs a few times more.

    Args:
        inputs: the path of the module that the transcoder reads, such as "transformer.h.{}.mlp": the module's input,
            unless the path ends in ".output". None finds what the MLPs read.
        outputs: the same for what it predicts: the module's output, unless the path ends in ".input". None finds what
            the MLPs add to the residual.
        layers: the chosen layers, ascending; None for all.

    Raises:
        Refused: there is no such module or layer; a layer has no MLP, or none whose output is added to the residual;
            the message lists what the model has. Activations are not finite. The model cannot read text.
    """
    named = {key: path for key, path in (("inputs", inputs), ("outputs", outputs)) if path}
    there = {key: _layers_with(model, template, key) for key, template in named.items()}
    stacks = {_stack_of(template) for template in named.values()} or _stacks(model)
    count = min(_length(model, stack) for stack in stacks)
    chosen = list(range(count)) if layers is None else list(layers)
    if chosen != sorted(set(chosen)) or not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise Refused("model.layers", f"expected ascending numbers below {count}, got {chosen}")
    for key, present in there.items():
        lacking = [layer for layer in chosen if layer not in present]
        if lacking:
            raise _lacking(lacking, f"have no {named[key]!r}", sorted(set.intersection(*there.values())))
    sites = [{key: _site(model, template, layer, key) for key, template in named.items()} for layer in chosen]
    results = _try(model, stacks, dict(zip(chosen, sites, strict=True)))
    if len(named) == 2:
        _warn([result for of_layers in results.values() for result in of_layers])
        return [(site["inputs"], site["outputs"]) for site in sites]
    return _pairs(model, results, chosen)


def _stacks(model: PreTrainedModel) -> set[str]:
    """Lists of modules that may be the layers: as long as the config says, and in no other such list."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise _no_mlps(model, "it has no list of layers")
    return {path for path in outermost if _length(model, path) == n_layers} or set(outermost)


def _try(
    model: PreTrainedModel, stacks: Collection[str], sites: Mapping[int, Mapping[str, Site]]
) -> dict[str, list[Result]]:
    """What each layer of each stack has; a stack or layer that a forward pass does not reach is left out.

    Args:
        sites: of the chosen layers, those that are named.

    Raises:
        Refused: the model cannot read text, or its activations are not finite.
    """
    results: dict[str, list[Result]] = {}
    shape = few_tokens(model).shape

    def examine(stack: str, number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            so_far = results.setdefault(stack, [])
            if any(result.layer == number for result in so_far):
                return  # a layer that is called again; `find_order` refuses it
            layer = Layer(f"{stack}.{number}", module, args, kwargs, shape)
            for value in (layer.x, layer.h):
                check_finite(value, number)
            so_far.append(layer.result(number, sites[number]))

        return before

    with ExitStack() as hooks:
        for stack in stacks:
            for number in sites:
                module = _get(model, f"{stack}.{number}")
                if module is not None:
                    handle = module.register_forward_pre_hook(examine(stack, number), with_kwargs=True)
                    hooks.callback(handle.remove)
        run_few(model)
    return results


def _pairs(
    model: PreTrainedModel, results: Mapping[str, list[Result]], chosen: Sequence[int]
) -> list[tuple[Site, Site]]:
    """The sites of the one stack that has MLPs.

    Raises:
        Refused: none or several have; or not every chosen layer has one.
    """
    having = [stack for stack, of_layers in results.items() if any(result.outputs for result in of_layers)]
    if len(having) > 1:
        raise Refused(
            "model.inputs", f"several stacks of MLPs ({', '.join(having)}): set model.inputs and model.outputs"
        )
    if not having:
        reasons = [f"{stack}.{result.layer}: {result.complaint}" for stack, of in results.items() for result in of[:1]]
        raise _no_mlps(model, "; ".join(reasons) or "a forward pass reaches none of its layers")
    (stack,) = having
    found = {result.layer: result for result in results[stack]}
    lacking = [layer for layer in chosen if layer not in found or not found[layer].outputs]
    if lacking:
        why = found[lacking[0]].complaint if lacking[0] in found else "a forward pass does not reach it"
        rest = [layer for layer in chosen if layer not in lacking]
        raise _lacking(lacking, f"of {type(model).__name__} have no MLP that can be read ({lacking[0]}: {why})", rest)
    _warn(results[stack])
    return [(one.inputs, one.outputs) for one in map(found.__getitem__, chosen) if one.inputs and one.outputs]


def _warn(results: Sequence[Result]) -> None:
    """Warn, once, of named sites that are something else than what their settings are for."""
    result = next((result for result in results if result.complaint), None)
    if result is not None:
        what = "reads" if result.fault == "inputs" else "adds to the residual"
        log.warning(
            f"model.{result.fault}: read as named, but it is not what the MLP of layer {result.layer} {what}: "
            f"{result.complaint}"
        )


def _lacking(layers: Sequence[int], what: str, rest: Sequence[int]) -> Refused:
    remedy = f"choose those that have: model.layers = {list(rest)}" if rest else "set model.inputs and model.outputs"
    return Refused("model.layers", f"layers {', '.join(map(str, layers))} {what}: {remedy}")


def _no_mlps(model: PreTrainedModel, why: str) -> Refused:
    return Refused(
        "model.outputs",
        f"found no MLPs in {type(model).__name__} ({why}): set model.inputs and model.outputs to paths with {{}} for "
        f"the layer",
    )


def _stack_of(template: str) -> str:
    return template.partition("{}")[0].rstrip(".")


def _layers_with(model: PreTrainedModel, template: str, key: str) -> set[int]:
    """Which layers have a module at the path of a template.

    Args:
        key: the setting of `[model]` that holds the template.
    """
    if template.count("{}") != 1:
        raise Refused(f"model.{key}", f'expected one {{}} for the layer, as in "model.layers.{{}}.mlp": {template!r}')
    layers = range(_length(model, _stack_of(template)))
    present = {layer for layer in layers if _module_and_side(model, template.format(layer)) is not None}
    if not present:
        raise Refused(f"model.{key}", _missing(model, template.format(0)))
    return present


def _length(model: PreTrainedModel, stack: str) -> int:
    """How many layers a list of them has."""
    module = _get(model, stack)
    return len(list(module.children())) if module is not None else 0


def _site(model: PreTrainedModel, template: str, layer: int, key: str) -> Site:
    module = _module_and_side(model, template.format(layer))
    assert module is not None, "other layers were refused"
    return Site(module[0], module[1] or ("input" if key == "inputs" else "output"))


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
