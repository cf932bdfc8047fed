"""What plugins keep from step to step: how it is saved, and how what would be lost is found.

Saved are the parameters and buffers of every plugin object that is a `torch.nn.Module`: those within the transcoder
with it, all others in `training.safetensors` by path (`losses[1].mean`); and what `Stateful` objects say, in
`training.json`. Any other tensor that an object holds and changes would be lost: a resumed run would differ without a
word. `Watch` finds such tensors by their identity and version. It reads no numbers.
"""

from __future__ import annotations

import json
import logging
import re
from array import array
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from clt_plugins.contract.stateful import Stateful
from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import PluginError, Refused, names
from clt_plugins.model.parameters import View, saved_buffers
from clt_plugins.registry.build import plugin_error

if TYPE_CHECKING:
    from clt_plugins.contract.spec import Choice
    from clt_plugins.files.sliced import SlicedTensors
    from clt_plugins.model.assemble import Parts

logger = logging.getLogger(__name__)

OF_PLUGIN = re.compile(r"(\w+\[\d+\])\.")
"""What names of saved tensors begin with: `losses[1].`."""
DEPTH = 3
"""How far a plugin's lists, tables and records are looked into."""
NUMBERS_AND_TEXT = (str, bytes, bytearray, memoryview, range, array)
"""Collections that hold no tensors; so do NumPy arrays, but those of objects."""
BY_MODULES = "make it a buffer (`register_buffer` of a torch.nn.Module) or a parameter, or "
"""How objects other than transforms keep tensors: the position of a transform is that of the batches it has seen."""
TORCHS = frozenset(vars(nn.Module()))
"""Attributes of every module that are torch's own."""


def tensors(parts: Parts) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Parameters and buffers of modules outside the transcoder, by path and name; and the feature axis of each."""
    out: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    of_parameter: dict[str, dict[str, View]] = {}
    for part, cut in parts.transcoder.views().items():
        of_parameter.setdefault(cut[0], {})[part] = cut
    for path, module in parts.outside().items():
        for name, parameter in module.named_parameters():
            out[f"{path}.{name}"], axes[f"{path}.{name}"] = parameter, getattr(parameter, "feature_axis", None)
        for name, value, axis in saved_buffers(module):
            if isinstance(axis, str):
                for part, (_, view, its) in of_parameter[axis].items():
                    out[f"{path}.{name}.{part}"], axes[f"{path}.{name}.{part}"] = view(value), its
            else:
                out[f"{path}.{name}"], axes[f"{path}.{name}"] = value, axis
    return out, axes


def data(parts: Parts) -> dict[str, Any]:
    """What `Stateful` objects keep, by path: the choice's `name` and its `state`; all ranks call it.

    Raises:
        PluginError: it is no plain JSON data, or differs between ranks; names the plugin.
    """
    out = {}
    with all_or_none(parts.context.parallel):
        for path, one in parts.chosen().items():
            if isinstance(one, Stateful):
                out[path] = {"name": _choice(parts, path).spec.name, "state": _plain(parts, path, one.state())}
    if parts.context.parallel.world > 1 and out:
        everyone = [json.loads(text) for text in parts.context.parallel.gather(json.dumps(out))]
        for path, value in everyone[0].items():
            rank = next((rank for rank, theirs in enumerate(everyone) if theirs[path] != value), None)
            if rank is not None:
                text = f"its `state` differs between ranks 0 and {rank}: add up what they count (`parallel.total`)"
                raise _error(parts, path, text)
    return out


def _plain(parts: Parts, path: str, value: Any) -> Any:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError) as error:
        text = f"its `state` must be plain JSON data (numbers that are finite, text, lists, tables): {error}"
        raise _error(parts, path, text) from error
    if not same:
        text = "its `state` is not what JSON gives back: use lists for tuples, and text for the keys of tables"
        raise _error(parts, path, text)
    return value


@torch.no_grad()
def load(parts: Parts, stored: SlicedTensors, saved: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Set what plugins outside the transcoder keep to what a checkpoint holds.

    Args:
        saved: `TrainingState.plugins`.
        accepted: paths that may be lacking; what is there begins anew.

    Raises:
        Refused: something is not in the checkpoint; names it.
    """
    targets, axes = tensors(parts)
    for name in stored.shapes:
        if OF_PLUGIN.match(name) and name not in targets and not names(accepted, name):
            raise Refused(
                stored.folder, f"holds the state {name!r}, which no plugin takes; to drop it: --accept {name}"
            )
    for name, target in targets.items():
        shape, axis = list(target.shape), axes[name]
        if axis is not None:
            shape[axis] = parts.transcoder.n_features
        if stored.shapes.get(name) == shape:
            target.copy_(read(stored, name, axis, parts))
        else:
            _anew(stored, name, accepted, f"of shape {shape}")
    for path, one in parts.chosen().items():
        if not isinstance(one, Stateful):
            continue
        name, found = _choice(parts, path).spec.name, saved.get(path, {})
        if found.get("name") == name:
            one.load_state(found["state"])
        else:
            _anew(stored, path, accepted, f"of {name!r}")


def _anew(stored: SlicedTensors, path: str, accepted: Collection[str], what: str) -> None:
    """A plugin's state is not in the checkpoint, or is another's."""
    if not names(accepted, path):
        raise Refused(stored.folder, f"lacks the state {path} {what}; if it may begin anew: --accept {path}")
    logger.warning("%s: the checkpoint has no such state %s: it begins anew", path, what)


def read(stored: SlicedTensors, name: str, axis: int | None, parts: Parts) -> Tensor:
    """A saved tensor, or this rank's part of it along its feature axis."""
    return stored.read(name) if axis is None else stored.read_part(name, axis, parts.transcoder.own)


class Watch:
    """Notes the tensors that plugin objects hold, and finds those that change and are not saved.

    A tensor is saved if it is a parameter or buffer of one of the objects, or a view of one. Buffers with
    `persistent=False` and attributes named by an object's class attribute `caches` may be forgotten.

    Raises:
        PluginError: an object holds a parameter that torch does not know of, so that it would never be trained.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        self.objects = parts.chosen() | {f"transforms[{number}]": one for number, one in enumerate(parts.transforms)}
        self.known = {path: self._unsaved(path, one) for path, one in self.objects.items()}

    def check(self) -> None:
        """All ranks call it.

        Raises:
            PluginError: a tensor has changed or appeared that no checkpoint would hold; names plugin, attribute and
                remedy.
        """
        with all_or_none(self.parts.context.parallel):
            for path, one in self.objects.items():
                known = self.known[path]
                for attribute, (tensor, version) in self._unsaved(path, one).items():
                    before = known.get(attribute)
                    if before is None or before[0] is not tensor or before[1] != version:
                        kept = "" if path.startswith("transforms") else BY_MODULES
                        text = (
                            f"its tensor `{attribute}` changes during training and is in no checkpoint, so a resumed "
                            f"run would differ: {kept}give it by `state` and `load_state`; if it may be forgotten, "
                            f"name it in the class attribute `caches = ({attribute.split('.')[0].split('[')[0]!r},)`"
                        )
                        raise _error(self.parts, path, text)

    def _unsaved(self, path: str, one: Any) -> dict[str, tuple[Tensor, int]]:
        """Tensors that an object holds outside of parameters and buffers, by attribute, each with its version."""
        if isinstance(one, Stateful):
            return {}
        saved = _storages(self.parts)
        found: dict[str, tuple[Tensor, int]] = {}
        for attribute, tensor in held(one):
            if tensor.untyped_storage()._cdata in saved:
                continue
            if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf):
                text = (
                    f"its parameter `{attribute}` would never be trained: the class must be a torch.nn.Module, and "
                    "have it as an attribute of its own (in a list: torch.nn.ParameterList or ModuleList)"
                )
                raise _error(self.parts, path, text)
            found[attribute] = tensor, 0 if tensor.is_inference() else tensor._version
        return found


def _storages(parts: Parts) -> set[int]:
    """The memory of all parameters and buffers."""
    modules = [parts.transcoder, *parts.outside().values()]
    return {x.untyped_storage()._cdata for module in modules for x in [*module.parameters(), *module.buffers()]}


def held(one: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an object's attributes, those of submodules included, by attribute."""
    own = type(one).__module__.partition(".")[0]
    modules = dict(one.named_modules()) if isinstance(one, nn.Module) else {"": one}
    for prefix, inner in modules.items():
        forgotten = {*TORCHS, *getattr(type(inner), "caches", ()), *getattr(type(one), "caches", ())}
        for name, value in _attributes(inner).items():
            if name not in forgotten:
                yield from _inside(f"{prefix}.{name}" if prefix else name, value, own, DEPTH)


def _inside(name: str, value: Any, own: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for inner, tensor in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{name}.{inner}", tensor
    elif depth and _has(value, "keys", "items", "__getitem__") and isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield from _inside(f"{name}[{key!r}]", item, own, depth - 1)
    elif depth and _has(value, "__len__", "__iter__", "__contains__") and not isinstance(value, NUMBERS_AND_TEXT):
        items = value
        if isinstance(value, np.ndarray):
            items = value.flat if value.dtype.hasobject else ()
        for number, item in enumerate(items):
            yield from _inside(f"{name}[{number}]", item, own, depth - 1)
    elif depth and _is_record(value, own):
        for inner_name, item in _attributes(value).items():
            yield from _inside(f"{name}.{inner_name}", item, own, depth - 1)


def _has(value: Any, *methods: str) -> bool:
    """Whether an object's class has these methods, as a mapping or a collection does.

    Asked before `isinstance`, which goes through hundreds of classes that are one for each class that is none.
    """
    return all(hasattr(type(value), method) for method in methods)


def _is_record(value: Any, own: str) -> bool:
    """Whether an object belongs to the plugin: of a class of the same package, or a record of no engine's."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, type) or package in ("clt_plugins", "torch", "builtins"):
        return False
    return package == own or attrs.has(type(value))


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: Any) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _error(parts: Parts, path: str, text: str) -> PluginError:
    return plugin_error(_choice(parts, path), path, text)


def _choice(parts: Parts, path: str) -> Choice:
    """What was chosen at a path."""
    recipe = parts.context.recipe
    assert recipe is not None
    return dict(recipe.selected())[path].choice
