"""Parameters and buffers: their first values, the same for every number of ranks; which axis counts features; how files
cut them; their roles; and what no file may hold of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins.data.random import generator
from clt_plugins.errors import PluginError, Refused

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.spec import Selected
    from clt_plugins.contract.training.optimizer import Role

CHUNK = 2**22
"""Numbers drawn at a time."""
View = tuple[str, Callable[[Tensor], Tensor], int | None]
"""(a parameter's name, the view of it that a file holds, the axis of the view that counts features)."""
AXES = "_feature_axes"
"""A module's attribute: name of a buffer -> the axis that counts features."""


def uniform(name: str, shape: tuple[int, ...], bound: float, context: Context, feature_axis: int) -> Tensor:
    """Numbers of U(-bound, bound) for this rank's features.

    They are drawn on the CPU for all F features, from a generator that depends on the run's seed and `name` only,
    and then cut, so that a rank of many starts with the rows that a single process would have.

    Args:
        shape: of the whole, with F at `feature_axis`.
    """
    if context.device.type == "meta":
        shape = (*shape[:feature_axis], len(context.parallel.shard(shape[feature_axis])), *shape[feature_axis + 1 :])
        return torch.empty(shape, dtype=context.dtype, device="meta")
    numbers = generator(context.seed, name)
    dtype = torch.float64 if context.dtype == torch.float64 else torch.float32
    own = context.parallel.shard(shape[feature_axis])
    before, (features, *after) = math.prod(shape[:feature_axis]), shape[feature_axis:]
    out = torch.empty(before, len(own), *after, dtype=context.dtype, device=context.device)
    # A part of the rows at a time, those of other ranks too, so that the generator goes on as for one process.
    rows = max(1, CHUNK // math.prod(after))
    for block in out:
        for first in range(0, features, rows):
            part = range(first, min(first + rows, features))
            drawn = torch.empty(len(part), *after, dtype=dtype).uniform_(-bound, bound, generator=numbers)
            start, stop = max(part.start, own.start), min(part.stop, own.stop)
            if start < stop:
                block[start - own.start : stop - own.start] = drawn[start - first : stop - first].to(out)
    return out.view(*shape[:feature_axis], len(own), *after)


def parameter(
    value: Tensor, feature_axis: int | None, *, partial_gradient: bool = False, lr_factor: float = 1.0
) -> nn.Parameter:
    """A parameter that says which of its axes counts features; None if every rank has all of it.

    Args:
        partial_gradient: every rank has all of it, but it feeds only that rank's features, so that its gradients
            must be summed over ranks; False for what acts on the reconstruction, such as a bias.
        lr_factor: multiplies the learning rate, for numbers that have to go farther or less far than weights.
    """
    marked = nn.Parameter(value)
    marked.lr_factor = lr_factor  # type: ignore[attr-defined]
    marked.feature_axis = feature_axis  # type: ignore[attr-defined]
    marked.partial_gradient = partial_gradient  # type: ignore[attr-defined]
    return marked


def buffer(value: Tensor, feature_axis: int | None = None, *, like: str = "") -> Tensor:
    """A tensor for `register_buffer` that says which of its axes counts features, so that its slices are saved.

    It keeps saying so where a step puts another tensor in its place (`self.mean = 0.9 * self.mean + ...`).

    Args:
        like: of a callback: the name of the transcoder's parameter (`tying.weight`) that it has the shape of, and is
            cut for files like.
    """
    value.feature_axis = like or feature_axis  # type: ignore[attr-defined]
    return value


def note_axes(module: nn.Module) -> None:
    """Remember which axis of each buffer counts features: a tensor that takes its place does not say."""
    for inner in module.modules():
        marked = {name: vars(value) for name, value in inner._buffers.items() if value is not None}
        axes = {name: marks["feature_axis"] for name, marks in marked.items() if "feature_axis" in marks}
        vars(inner)[AXES] = vars(inner).get(AXES, {}) | axes


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """(name, buffer, feature axis or the parameter that it is cut like) of the buffers that are saved: all but those
    with `persistent=False`."""
    for prefix, inner in module.named_modules():
        for name, value in inner._buffers.items():
            if value is not None and name not in inner._non_persistent_buffers_set:
                full = f"{prefix}.{name}" if prefix else name
                yield full, value, vars(inner).get(AXES, {}).get(name)


def give_memory(module: nn.Module, device: torch.device | str) -> None:
    """Memory, with undefined content, for a module that was built on "meta"; others stay as they are.

    torch makes new parameters for it; what `parameter` has marked them with is carried over.
    """
    if not any(value.is_meta for value in module.parameters()):
        return
    marks = {name: dict(vars(value)) for name, value in module.named_parameters()}
    module.to_empty(device=device)
    for name, value in module.named_parameters():
        vars(value).update(marks[name])


def own_views(module: nn.Module) -> dict[str, View]:
    """Parameters that files hold as they are, under their own names."""
    return {
        name: (name, lambda x: x, getattr(value, "feature_axis", None)) for name, value in module.named_parameters()
    }


def joined_views(parts: Mapping[str, Mapping[str, View]], choices: Mapping[str, Selected]) -> dict[str, View]:
    """The views of a transcoder's parts: name in files -> view of `part.parameter`.

    Raises:
        PluginError: two parts give one name.
    """
    views: dict[str, View] = {}
    for part, of_part in parts.items():
        for name, (inner, view, axis) in of_part.items():
            if name in views or name.startswith("normaliser."):
                others = (repr(choices[one].name) for one in parts if one != part)
                raise PluginError(
                    f"{part}: {choices[part].choice}: its parameter {name!r} has the name of a tensor of the "
                    f"normaliser, {' or '.join(others)} in files: rename it",
                    where=(part,),
                )
            views[name] = (f"{part}.{inner}", view, axis)
    return views


def role_of(name: str, rows: bool) -> Role:
    """The role of a weight by its name, and whether it holds rows."""
    if name.startswith("losses["):
        return "loss"
    if name.startswith("activation."):
        return "threshold"
    if name.startswith("encoder."):
        return "encoder" if rows else "bias"
    if name.startswith("tying."):
        return "decoder" if rows else "bias"
    return "other"


def is_matrix(weight: nn.Parameter, d_model: int) -> bool:
    """Whether a parameter holds rows, of features or between dimensions; not a bias or threshold.

    Rows of a decoder may be a list [R, D]; whatever else is a matrix has one for each layer. An encoder's rows need not
    have d_model numbers.
    """
    is_list = getattr(weight, "feature_axis", None) == 0 and weight.shape[-1] == d_model
    return weight.dim() >= (2 if is_list else 3)


def freeze(transcoder: Any, roles: Collection[str]) -> None:
    """Train the parameters of these roles no more: they get no gradient and no optimizer.

    Raises:
        Refused: the transcoder has no parameter of a role.
    """
    left = set(roles)
    for name, value in transcoder.named_parameters():
        role = role_of(name, is_matrix(value, transcoder.d_model))
        if role in roles:
            value.requires_grad_(False)
            left.discard(role)
    if left:
        text = f"there are no weights of the role {', '.join(map(repr, sorted(left)))} here: leave it out"
        raise Refused("transcoder.freeze", text)


def check_finite(transcoder: Any, name: str, value: Tensor, folder: Path) -> None:
    """Refuse a learned tensor with numbers that are not finite: features would be silent, unseen. Buffers may hold any.

    -inf is taken where it is no weight: it is the logarithm of a threshold of 0.

    Args:
        transcoder: a `CrossLayerTranscoder`; this module stands below it.
        name: of the tensor in files.
        folder: where it was read from.

    Raises:
        Refused: names the tensor.
    """
    if name not in transcoder.views() or bool(value.isfinite().all()):
        return
    if name.startswith(("W_", "b_")) or bool((value.isnan() | value.isposinf()).any()):
        raise Refused(folder, f"tensor {name!r} holds numbers that are not finite")
