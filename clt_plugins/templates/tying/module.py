"""What `build` returns: a `Tying`. Shapes: B tokens, L layers, D d_model, F features per layer of this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clt_plugins import Context, Features, Layout, parameter, sparse_decode, uniform


class Example(nn.Module):
    """y_t = a_t W_t + b_t."""

    def __init__(self, scale: float, context: Context):
        super().__init__()
        self.n_layers, self.kernels = context.n_layers, context.kernels
        shape = context.n_layers, context.n_features, context.d_model
        bound = scale * (context.n_layers * context.d_model) ** -0.5
        # `uniform` draws the numbers of all ranks and cuts out this rank's rows: the first values do not depend on the
        # number of ranks. Both parameters say along which axis they count features; the bias counts none.
        self.weight = parameter(uniform("W_dec", shape, bound, context, feature_axis=1), feature_axis=1)
        bias = torch.zeros(context.n_layers, context.d_model, dtype=context.dtype, device=context.device)
        self.b_dec = parameter(bias, feature_axis=None)

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D]. The engine adds it up over ranks, so the bias must not be in it."""
        if features.pairs is not None:
            layout = Layout.own_layer(self.n_layers, self.weight.shape[1])
            return sparse_decode(features.values, features.pairs, self.weight, layout, self.kernels)
        dense = features.dense()
        written: Tensor = torch.einsum("blf,lfd->bld", dense, self.weight.to(dense.dtype))
        return written

    def affine(self, inputs: Tensor) -> Tensor:
        """What does not depend on features, [L, D]. `inputs` are for a skip path, which this tying has not."""
        return self.b_dec.to(inputs.dtype)

    def norms(self) -> Tensor:
        """The norm of each feature's decoder rows, [L, F], detached."""
        return self.weight.detach().float().norm(dim=2)

    def expand(self, layer: int) -> Tensor:
        """The rows of a layer's features for it and all later layers, [F, L - layer, D], detached."""
        rows = self.weight.detach()[layer]
        later = rows.new_zeros(rows.shape[0], self.n_layers - layer - 1, rows.shape[1])
        return torch.cat([rows[:, None], later], 1)

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """Name in files -> (parameter, the view of it in the file, the axis of that view that counts features)."""
        return {"W_dec": ("weight", lambda x: x, 1), "b_dec": ("b_dec", lambda x: x, None)}
