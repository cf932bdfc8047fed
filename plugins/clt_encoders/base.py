"""What all encoders share: the bias of each feature.

Shapes: L layers, F features per layer of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Context, parameter

View = tuple[str, Callable[[Tensor], Tensor], int | None]
"""How a parameter is cut for files: its name, a view of it, and the feature axis of the view."""


class Biased(nn.Module):
    """The base of all encoders. A form adds the parameter `b_enc`, `rows` and `expand`; and `inputs`, if it has any."""

    b_enc: nn.Parameter

    def inputs(self, x: Tensor) -> Tensor:
        """The normalised inputs themselves, [B, L, D]."""
        return x

    def bias(self) -> Tensor:
        """[L, F]."""
        return self.b_enc

    def views(self) -> dict[str, View]:
        """Every parameter as it is, by its own name."""
        return {name: (name, unchanged, p.feature_axis) for name, p in self.named_parameters()}  # type: ignore[attr-defined]


def zero_bias(context: Context) -> nn.Parameter:
    """[L, F]."""
    own = len(context.parallel.shard(context.n_features))
    return parameter(torch.zeros(context.n_layers, own, dtype=context.dtype, device=context.device), 1)


def unchanged(x: Tensor) -> Tensor:
    """The view of a parameter that files hold as it is."""
    return x
