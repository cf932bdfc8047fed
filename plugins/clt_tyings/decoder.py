"""What all tyings share: sizes, the bias of each target layer, and the optional skip path.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Context, parameter

View = tuple[str, Callable[[Tensor], Tensor], int | None]
"""How a parameter is cut for files: its name, a view of it, and the feature axis of the view."""


def unchanged(x: Tensor) -> Tensor:
    """The view of a parameter that files hold as it is."""
    return x


class Decoder(nn.Module):
    """The base of all tyings. A tying adds `decode`, `expand`, `norms` and `views`."""

    def __init__(self, context: Context, *, skip: bool):
        super().__init__()
        self.n_layers = context.n_layers
        self.n_features = len(context.parallel.shard(context.n_features))
        """F of this rank."""
        self.kernels = context.kernels
        shape = context.n_layers, context.d_model
        self.b_dec = parameter(torch.zeros(shape, dtype=context.dtype, device=context.device), None)
        self.skip: nn.Parameter | None = None
        if skip:
            zeros = torch.zeros(*shape, context.d_model, dtype=context.dtype, device=context.device)
            self.skip = parameter(zeros, None)

    def affine(self, inputs: Tensor) -> Tensor:
        """b_t, plus x_t S_t with a skip path: broadcasts to [B, L, D]."""
        bias = self.b_dec.to(inputs.dtype)
        if self.skip is None:
            return bias
        by_layer = torch.baddbmm(bias[:, None], inputs.transpose(0, 1), self.skip.to(inputs.dtype))
        return by_layer.transpose(0, 1)

    def shared_views(self) -> dict[str, View]:
        """The parameters that every tying has, by their names in files: b_dec [L, D] and W_skip [L, D, D]."""
        views: dict[str, View] = {"b_dec": ("b_dec", unchanged, None)}
        if self.skip is not None:
            views["W_skip"] = ("skip", unchanged, None)
        return views
