"""What training changes besides the transcoder: parameters of losses and other plugins that are modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.parameters import View


def parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """All parameters that training changes, by name; a loss's are `losses[N].name`."""
    by_name = dict(parts.transcoder.named_parameters())
    for path, module in parts.outside().items():
        by_name |= {f"{path}.{name}": value for name, value in module.named_parameters()}
    return by_name


def views(parts: Parts) -> dict[str, View]:
    """How all parameters are cut for files: name in files -> view."""
    by_file = parts.transcoder.views()
    for path, module in parts.outside().items():
        for name, value in module.named_parameters():
            by_file[f"{path}.{name}"] = (f"{path}.{name}", lambda x: x, getattr(value, "feature_axis", None))
    return by_file
