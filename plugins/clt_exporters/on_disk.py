"""A decoder that stays in its files: only the rows of active features are read, one layer at a time.

The files are mapped: the operating system keeps in memory what is used often, and releases it when memory is short.
This serves to inspect, evaluate and export transcoders whose decoder is larger than the memory. It cannot be trained.

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
    """A `Tying` that computes like `untied`, and is saved as one.

    Args:
        weights: for each source layer s a tensor [F, L - s, D], mapped from a file, of any floating type.
        bias: of each target layer, [L, D].
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
                of_source = features.pairs.layer == source
                feature = features.pairs.feature[of_source] - source * width
                used, column = feature.unique(return_inverse=True)
                acts = out.new_zeros(tokens, len(used))
                acts[features.pairs.token[of_source], column] = features.values[of_source]
            for begin in range(0, len(used), ROWS):
                block = used[begin : begin + ROWS]
                rows = weight[block.to(weight.device)].to(out.device, out.dtype)
                columns = acts[:, block] if features.pairs is None else acts[:, begin : begin + ROWS]
                out[:, source:] += (columns @ rows.flatten(1)).view(tokens, -1, self.d_model)
        return out

    def affine(self, inputs: Tensor) -> Tensor:
        """The bias of each target."""
        return self.b_dec.to(inputs.device, inputs.dtype)

    def expand(self, layer: int) -> Tensor:
        """The decoder of one source layer, [F, L - layer, D], as the file has it."""
        return self.weights[layer].detach()

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature, [L, F]; a block of rows is in memory at a time."""
        by_layer = ([block.float().flatten(1).norm(dim=1) for block in weight.split(ROWS)] for weight in self.weights)
        return torch.stack([torch.cat(norms) for norms in by_layer])

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """The files of an untied decoder."""
        views: dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]] = {"b_dec": ("b_dec", unchanged, None)}
        for source in range(self.n_layers):
            views[f"W_dec.{source:02}"] = (f"weights.{source}", unchanged, 0)
        return views


def unchanged(x: Tensor) -> Tensor:
    return x
