"""Single features of a transcoder: their rows of the encoder, the decoder and the optimizer.

Rows are reached by views of parameters, which serve the optimizer's tensors as well, since those have the shapes of
parameters, or length 1 along axes that do not count features.

Shapes: L layers, D d_model, F features per layer (of this rank), N features that are changed, H numbers of an encoder's
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clt_plugins.contract.abilities import OwnRows
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder

View = Callable[[Tensor], Tensor]
"""From a parameter, or a tensor of its shape, to a layer's part of it, with the features first."""
LOW = "low"
"""What `AdamBF16` calls the lower halves of bfloat16 weights; a new weight has none."""


class Rows:
    """The rows of a transcoder's features, of this rank."""

    def __init__(self, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer):
        self.transcoder, self.optimizer = transcoder, optimizer

    def encoder(self, layer: int) -> tuple[nn.Parameter, View]:
        """The encoder's rows of a layer, [F, H].

        Raises:
            Refused: they are no parameter of the encoder.
        """
        return self.transcoder.W_enc, lambda x: x[layer]

    def bias(self, layer: int) -> tuple[nn.Parameter, View]:
        """The encoder's biases of a layer, [F]."""
        return self.transcoder.b_enc, lambda x: x[layer]

    def decoder(self, layer: int) -> tuple[nn.Parameter, View]:
        """The decoder's rows of a layer, [F, n, D]; n is L - layer, or 1 where a row serves all targets.

        Raises:
            Refused: the tying has no rows of single features.
        """
        tying = self.transcoder.tying
        if not isinstance(tying, OwnRows):
            name = self.transcoder.choices["tying"].name
            raise Refused("callbacks", f"features of the tying {name!r} have no decoder rows of their own: use another")
        name, view = tying.own_rows(layer)
        return self.transcoder.get_parameter(f"tying.{name}"), view

    def as_rows(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's encoder multiplies with, of normalised inputs [N, D] of that layer: [N, H]."""
        return x

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, view: View, feature: Tensor, value: Tensor | float) -> None:
        """Set entries of some features, and forget what the optimizer knows of them."""
        target = view(parameter.data)
        target[feature] = value.to(target) if isinstance(value, Tensor) else torch.full_like(target[feature], value)
        for state in self._states(parameter):
            view(state)[feature] = 0

    @torch.no_grad()
    def scale(self, parameter: nn.Parameter, view: View, factor: Tensor) -> None:
        """Multiply the entries of every feature by a factor, [F]; what the optimizer knows of gradients stays."""
        target = view(parameter.data)
        shape = (-1, *[1] * (target.dim() - 1))
        target.mul_(factor.to(target).view(shape))
        low = self.optimizer.state.get(parameter, {}).get(LOW)
        if low is not None:
            view(low).masked_fill_((factor != 1).view(shape), 0)

    def _states(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The optimizer's tensors with an entry or row for each feature."""
        axis: int = parameter.feature_axis  # type: ignore[attr-defined]
        for value in self.optimizer.state.get(parameter, {}).values():
            fits = isinstance(value, Tensor) and value.dim() == parameter.dim()
            if fits and value.shape[axis] == parameter.shape[axis]:
                yield value
