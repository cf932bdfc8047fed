"""What training changes besides the transcoder: parameters (and buffers) of losses that are modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from clt_plugins.contract.training.loss import Loss
    from clt_plugins.model.assemble import Parts

View = tuple[str, Callable[[Tensor], Tensor], int | None]
"""(parameter's name, the view of it that a file holds, the axis of the view that counts features)."""


def _modules(losses: Sequence[Loss]) -> dict[str, nn.Module]:
    return {f"losses.{index}": loss for index, loss in enumerate(losses) if isinstance(loss, nn.Module)}


def parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """All parameters that training changes, by name; a loss's are `losses.N.name`."""
    by_name = dict(parts.transcoder.named_parameters())
    for prefix, module in _modules(parts.losses).items():
        by_name |= {f"{prefix}.{name}": value for name, value in module.named_parameters()}
    return by_name


def views(parts: Parts) -> dict[str, View]:
    """How all parameters are cut for files: name in files -> view."""
    by_file = parts.transcoder.views()
    for prefix, module in _modules(parts.losses).items():
        for name, value in module.named_parameters():
            by_file[f"{prefix}.{name}"] = (f"{prefix}.{name}", lambda x: x, getattr(value, "feature_axis", None))
    return by_file


def loss_state(losses: Sequence[Loss]) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Parameters and buffers of losses by name, as views, and the feature axis of each."""
    tensors: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    for prefix, module in _modules(losses).items():
        marked = dict(module.named_parameters())
        # `state_dict` has buffers besides parameters, so a running mean of a loss resumes too.
        for name, value in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = value
            axes[f"{prefix}.{name}"] = getattr(marked.get(name), "feature_axis", None)
    return tensors, axes
