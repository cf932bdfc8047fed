"""A decoder that stays in its files: only the rows of active features are read, a layer at a time.

The files are mapped into memory, so the operating system keeps what is used often, and lets go of it when memory is
short. For looking at, evaluating and exporting transcoders whose decoder is larger than the memory; not for training.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clt_plugins import Context, Features

ROWS = 4096
"""Features whose rows are in memory at a time."""


class Mapped(nn.Module):
    """An `interfaces.Tying` like `untied`, which also writes the same files when it is saved.

    Args:
        weights: for each source layer [F, L - s, D], mapped from a file, in any type.
    """

    def __init__(self, context: Context, weights: Sequence[Tensor], bias: Tensor):
        super().__init__()
        self.n_layers, self.d_model = context.n_layers, context.d_model
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        self.b_dec = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D], in the features' type."""
        tokens, _, width = features.shape
        out = features.values.new_zeros(tokens, self.n_layers, self.d_model)
        for source, weight in enumerate(self.weights):
            if features.pairs is None:
                acts = features.values[:, source]
                used = acts.any(0).nonzero().squeeze(1)
            else:
                own = features.pairs.layer == source
                numbers = features.pairs.feature[own] - source * width
                used, place = numbers.unique(return_inverse=True)
                acts = out.new_zeros(tokens, len(used))
                acts[features.pairs.token[own], place] = features.values[own]
            for begin in range(0, len(used), ROWS):
                some = used[begin : begin + ROWS]
                rows = weight[some.to(weight.device)].to(out.device, out.dtype)
                columns = acts[:, some] if features.pairs is None else acts[:, begin : begin + ROWS]
                out[:, source:] += (columns @ rows.flatten(1)).view(tokens, -1, self.d_model)
        return out

    def affine(self, inputs: Tensor) -> Tensor:
        """The bias of each target."""
        return self.b_dec.to(inputs.device, inputs.dtype)

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer, [F, L - layer, D], as the file has it."""
        return self.weights[layer].detach()

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature, [L, F]."""
        return torch.stack([torch.cat([some.float().flatten(1).norm(dim=1) for some in weight.split(ROWS)])
                            for weight in self.weights])  # fmt: skip

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """The files of an untied decoder."""
        views: dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]] = {"b_dec": ("b_dec", _whole, None)}
        for source in range(self.n_layers):
            views[f"W_dec.{source:02}"] = (f"weights.{source}", _whole, 0)
        return views


def _whole(x: Tensor) -> Tensor:
    return x
