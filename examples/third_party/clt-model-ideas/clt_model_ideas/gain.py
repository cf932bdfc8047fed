"""The encoder `gain`: pre = ((x - shift) · gain) · rows + b.

The shift is the bias that sparse autoencoders subtract first (Bricken et al. 2023, "Towards Monosemanticity").
L layers, F features per layer of this rank, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from clt_plugins import Context, Tying, parameter, uniform


class Gain(nn.Module):
    """An `Encoder`."""

    def __init__(self, gain: float, context: Context):
        super().__init__()
        shape = (context.n_layers, context.n_features, context.d_model)
        first = uniform("encoder", shape, context.n_features**-0.5, context, feature_axis=1)
        self.weight = parameter(first, feature_axis=1)
        self.b_enc = parameter(first.new_zeros(first.shape[:2]), feature_axis=1)
        # All features share these two, and each rank knows the gradient by its own only.
        each = (context.n_layers, context.d_model)
        self.shift = parameter(first.new_zeros(each), None, partial_gradient=True)
        self.gain = parameter(first.new_full(each, gain), None, partial_gradient=True)

    def inputs(self, x: Tensor) -> Tensor:
        """[B, L, D]."""
        return (x - self.shift.to(x.dtype)) * self.gain.to(x.dtype)

    def rows(self, tying: Tying) -> Tensor:
        """[L, F, D]."""
        return self.weight

    def bias(self) -> Tensor:
        """[L, F]."""
        return self.b_enc

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """W · gain [F, D], and b - (W · gain) shift [F]."""
        tensors = (self.weight, self.b_enc, self.shift, self.gain)
        weight, bias, shift, gain = (p.detach()[layer].double() for p in tensors)
        return weight * gain, bias - (weight * gain) @ shift

    def views(self) -> dict[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """Name in files -> (parameter, view, axis that counts features). `W_enc` would mean rows that read x itself."""
        axes = {"weight": 1, "b_enc": 1, "shift": None, "gain": None}
        names = {"weight": "W_gain", "shift": "input_bias", "gain": "input_gain"}
        return {names.get(name, name): (name, lambda x: x, axis) for name, axis in axes.items()}
