"""An optimizer's state in checkpoints: the tensors that it keeps beside each parameter.

| what | shape | in a checkpoint |
| --- | --- | --- |
| a moment | the parameter's | `exp_avg/W_enc`, cut like the parameter |
| one number per row | 1 along axes that do not count features | `exp_avg_sq/W_enc`, cut like the parameter |
| a count | none | `step of W_enc` |
| a number of Python | none | `int step of W_enc` |
| any other tensor | any, where no features are split over ranks | `col_var of W_enc` |

All else is refused by name: a resumed run would not have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.errors import Refused, names
from clt_plugins.training import learned
from clt_plugins.training.kept.state import read

if TYPE_CHECKING:
    from clt_plugins.files.sliced import SlicedTensors
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.parameters import View

NUMBERS: dict[str, type] = {"int": int, "float": float, "bool": bool}


def moments(parts: Parts, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The optimizer's state by its names in files; and the feature axis of each tensor.

    Raises:
        Refused: it keeps something that checkpoints cannot hold; names it.
    """
    parameters = learned.parameters(parts)
    out: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    by_owner: dict[str, dict[str, View]] = {name: {} for name in parameters}
    for name, cut in learned.views(parts).items():
        by_owner[cut[0]][name] = cut
    for owner, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if type(value) in NUMBERS.values():
                out[f"{type(value).__name__} {key} of {owner}"] = torch.tensor(value, dtype=_wide(value))
            elif not isinstance(value, Tensor):
                raise _unsaved(owner, key, f"is {type(value).__name__}: keep tensors or numbers")
            elif value.dim() and _along(value, parameter):
                for name, (_, view, axis) in by_owner[owner].items():
                    out[f"{key}/{name}"], axes[f"{key}/{name}"] = _seen(owner, key, value, parameter, view), axis
            elif value.dim() and _is_split(parts, parameter):
                text = f"has shape {list(value.shape)} beside {list(parameter.shape)}, which cannot be split over ranks"
                raise _unsaved(owner, key, f"{text}: set parallel.tensor = 1, or take another optimizer")
            else:
                out[f"{key} of {owner}"] = value
    return out, {name: axes.get(name) for name in out}


@torch.no_grad()
def set_moments(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    stored: SlicedTensors,
    saved: Iterable[str],
    accepted: Collection[str] = (),
) -> None:
    """Set the optimizer's state to what a checkpoint has.

    Args:
        saved: the names of the tensors in it that are of the optimizer.
        accepted: paths of plugins whose state may be of another one.

    Raises:
        Refused: the checkpoint is of other parameters, or of another number of ranks that it cannot be split over.
    """
    parameters, views = learned.parameters(parts), learned.views(parts)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for full in sorted(saved):
        key, whole, owner = full.partition(" of ")
        name = owner
        if not whole:
            key, _, name = full.partition("/")
            owner = views[name][0] if name in views else ""
        parameter = parameters.get(owner)
        if parameter is None and names(accepted, owner or name or full):
            continue
        if parameter is None:
            raise Refused(stored.folder, f"unknown training state {full!r}")
        state = optimizer.state[parameter]
        kind, _, number = key.partition(" ")
        if whole and kind in NUMBERS and number:
            state[number] = NUMBERS[kind](stored.read(full).item())
        elif whole:
            state[key] = _whole(parts, stored, full, parameter, groups[id(parameter)], state.get(key))
        else:
            _, view, axis = views[name]
            part = read(stored, full, axis, parts)
            if key not in state:
                state[key] = torch.zeros(_shape(part, parameter, view), dtype=part.dtype, device=parameter.device)
            _seen(owner, key, state[key], parameter, view).copy_(part)


def _whole(parts: Parts, stored: SlicedTensors, full: str, parameter: Tensor, group: Any, present: Any) -> Tensor:
    """A tensor that is not cut, on the device where the optimizer expects it."""
    saved = stored.read(full)
    if saved.dim() and _is_split(parts, parameter):
        text = f"{full!r} cannot be split over ranks: resume with parallel.tensor = 1, as the run was"
        raise Refused(stored.folder, text)
    if isinstance(present, Tensor):
        return saved.to(present.device)
    # As in torch's `load_state_dict`: only these keep counts beside the parameter.
    beside = saved.dim() or group.get("fused") or group.get("capturable")
    return saved.to(parameter.device) if beside else saved


def _wide(value: Any) -> torch.dtype:
    return torch.float64 if isinstance(value, float) else torch.int64


def _along(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has the parameter's axes, each of its length or, if it does not count features, of length 1."""
    feature_axis = getattr(parameter, "feature_axis", None)
    return value.dim() == parameter.dim() and all(
        size == full or (size == 1 and axis != feature_axis)
        for axis, (size, full) in enumerate(zip(value.shape, parameter.shape, strict=True))
    )


def _seen(owner: str, key: str, value: Tensor, parameter: Tensor, view: Any) -> Tensor:
    """A view of a tensor as a file holds it; axes along which it has length 1 keep that.

    The view is one of the parameter's shape. So the tensor is expanded to it, and each axis that then repeats one
    number (stride 0) is cut back.
    """
    full = view(value.expand_as(parameter))
    for axis in range(full.dim()):
        if full.stride(axis) == 0 and full.shape[axis] > 1:
            full = full.narrow(axis, 0, 1)
    if full.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        text = f"has shape {list(value.shape)} beside {list(parameter.shape)}, which cannot be cut like the parameter"
        raise _unsaved(owner, key, f"{text}: keep the parameter's shape")
    return full


def _shape(saved: Tensor, parameter: Tensor, view: Any) -> tuple[int, ...]:
    """The shape of the whole of which a file has a part: the parameter's, but 1 along axes that the part has not."""
    for shape in _candidates(parameter):
        try:
            part = view(torch.empty(shape, device="meta").expand(parameter.shape))
        except RuntimeError:
            continue
        cut = [1 if stride == 0 else size for size, stride in zip(part.shape, part.stride(), strict=True)]
        if cut == list(saved.shape):
            return shape
    return tuple(parameter.shape)


def _candidates(parameter: Tensor) -> Iterable[tuple[int, ...]]:
    """Shapes that state may have beside a parameter, the complete one first."""
    feature_axis = getattr(parameter, "feature_axis", None)
    free = [axis for axis in range(parameter.dim()) if axis != feature_axis]
    for chosen in range(2 ** len(free)):
        ones = {axis for number, axis in enumerate(free) if chosen >> number & 1}
        yield tuple(1 if axis in ones else size for axis, size in enumerate(parameter.shape))


def _is_split(parts: Parts, parameter: Tensor) -> bool:
    return parts.context.parallel.tensor_ranks > 1 and getattr(parameter, "feature_axis", None) is not None


def _unsaved(owner: str, key: str, text: str) -> Refused:
    return Refused("optimizer.name", f"its state {key!r} of {owner} {text}")
