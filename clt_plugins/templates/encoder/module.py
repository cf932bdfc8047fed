"""What `build` returns: an `Encoder`. Shapes: B tokens, L layers, D d_model, F features per layer of this rank."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from clt_plugins import Context, Tying, parameter, uniform


class Example(nn.Module):
    """pre = (x · exp(log_weight)) · rows + b."""

    def __init__(self, weight: float, context: Context):
        super().__init__()
        n_layers, n_features, d_model = context.n_layers, context.n_features, context.d_model
        # `uniform` draws the numbers of all ranks and cuts out this rank's rows: the first values do not depend on the
        # number of ranks.
        first = uniform("encoder", (n_layers, n_features, d_model), n_features**-0.5, context, feature_axis=1)
        self.weight = parameter(first, feature_axis=1)
        self.b_enc = parameter(first.new_zeros(first.shape[:2]), feature_axis=1)
        # Every rank has all of it, and knows the gradient by its own features only: gradients are added up.
        log_weight = first.new_full((n_layers, d_model), math.log(weight))
        self.log_weight = parameter(log_weight, None, partial_gradient=True)

    def inputs(self, x: Tensor) -> Tensor:
        """What rows are multiplied with, [B, L, D], in the type of x, which stays as it is."""
        return x * self.log_weight.exp().to(x.dtype)

    def rows(self, tying: Tying) -> Tensor:
        """[L, F, D]. A parameter as it is: its gradient is written into one buffer, by active features only."""
        return self.weight

    def bias(self) -> Tensor:
        """[L, F]."""
        return self.b_enc

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """The matrix [F, D] and the bias [F] of a layer on normalised inputs. What is computed is better in float64."""
        weight, log_weight, bias = (p.detach()[layer] for p in (self.weight, self.log_weight, self.b_enc))
        return weight.double() * log_weight.double().exp(), bias

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """Name in files -> (parameter, the view of it in the file, the axis of that view that counts features).

        `W_enc` would mean a matrix on the inputs as they are.
        """
        return {
            "W_weighted": ("weight", lambda x: x, 1),
            "b_enc": ("b_enc", lambda x: x, 1),
            "log_weight": ("log_weight", lambda x: x, None),
        }
