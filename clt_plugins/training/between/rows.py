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

from clt_plugins.contract.model.tying import FeatureRows
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

    @property
    def settable(self) -> set[str]:
        """Which weights of single features can be set: "encoder", "bias", "decoder"."""
        encoder, tying = self.transcoder.encoder, self.transcoder.tying
        has = {
            "encoder": _per_feature(encoder.rows(tying)),
            "bias": _per_feature(encoder.bias()),
            "decoder": isinstance(tying, FeatureRows),
        }
        return {name for name, one in has.items() if one}

    def encoder(self, layer: int) -> tuple[nn.Parameter, View]:
        """The encoder's rows of a layer, [F, H].

        Raises:
            Refused: they are no parameter of the encoder.
        """
        return self._of_encoder("rows", self.transcoder.encoder.rows(self.transcoder.tying)), lambda x: x[layer]

    def bias(self, layer: int) -> tuple[nn.Parameter, View]:
        """The encoder's biases of a layer, [F].

        Raises:
            Refused: they are no parameter of the encoder.
        """
        return self._of_encoder("biases", self.transcoder.encoder.bias()), lambda x: x[layer]

    def _of_encoder(self, what: str, value: Tensor) -> nn.Parameter:
        if not (isinstance(value, nn.Parameter) and _per_feature(value)):
            name = self.transcoder.choices["encoder"].name
            text = f"the encoder {name!r} computes its {what} from other weights, so those of a feature cannot be set"
            raise Refused("callbacks", text)
        return value

    def decoder(self, layer: int) -> tuple[nn.Parameter, View]:
        """The decoder's rows of a layer, [F, n, D]; n is L - layer, or 1 where a row serves all targets.

        Raises:
            Refused: the tying has no rows of single features.
        """
        tying = self.transcoder.tying
        if not isinstance(tying, FeatureRows):
            name = self.transcoder.choices["tying"].name
            raise Refused("callbacks", f"features of the tying {name!r} have no decoder rows of their own: use another")
        name, view = tying.feature_rows(layer)
        return self.transcoder.get_parameter(f"tying.{name}"), view

    @torch.no_grad()
    def rows_for(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's encoder multiplies rows with, of normalised inputs [N, D] of that layer: [N, H]."""
        inputs = x.new_zeros(len(x), self.transcoder.n_layers, x.shape[1])
        inputs[:, layer] = x
        return self.transcoder.encoder.inputs(inputs)[:, layer]

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
            # Layers come before features: a factor of Adafactor that is one row for all layers is no feature's.
            if fits and value.shape[: axis + 1] == parameter.shape[: axis + 1]:
                yield value


def _per_feature(value: Tensor) -> bool:
    """Whether it is a parameter [L, F, ...]."""
    return isinstance(value, nn.Parameter) and getattr(value, "feature_axis", None) == 1
