"""The weights of an earlier transcoder in the units of a new one's normalisation.

With raw inputs x = n C + m in the new normalisation's units n, and raw outputs y = u T + o in units u, an encoder on
raw inputs, pre = W x + b, becomes

    pre = (W C^T) n + (b + W m)

and what is written, y = sum of a W_dec + skip(x) + b_dec, becomes u = (y - o) T^-1. Pre-activations, and so features
and thresholds, keep their values.

Shapes: L layers, D d_model, F features per layer of the earlier transcoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugins.data.affine import Affine
from clt_plugins.model.normalisation.folded import raw_encoder
from clt_plugins.model.transcoder import CrossLayerTranscoder


class Units:
    """Weights of `old` in the units of `new`, layer by layer, in float64.

    Args:
        layers: the number in `new` of each of old's layers.

    Raises:
        Refused: a normalisation or the encoder is no such product; says why.
    """

    def __init__(self, new: CrossLayerTranscoder, old: CrossLayerTranscoder, layers: list[int]):
        self.old, folding = old, new.normaliser.fold()
        index = torch.tensor(layers)
        self.inputs, self.targets = (_taken(side, index) for side in (folding.inputs, folding.targets))
        self.old_inputs, self.old_targets = (
            side.to("cpu", torch.float64) for side in (old.normaliser.fold().inputs, old.normaliser.fold().targets)
        )

    def encoder(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's rows [F, D] and bias [F]."""
        matrix, bias = raw_encoder(self.old, layer)
        inputs = self.inputs.layers(layer, layer + 1)
        return _times(matrix, inputs), bias + matrix @ inputs.shift[0]

    def decoder(self, layer: int) -> Tensor:
        """The rows of a layer's features for its own layer and each later one, [F, L - layer, D]."""
        rows = self.old_targets.layers(layer).raw(self.old.tying.expand(layer).cpu().double())
        return self.targets.layers(layer).normalised(rows)

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """The bias [L, D] and the matrices of the skip path [L, D, D], None without one.

        Both are read off `Tying.affine`, which is linear in each layer's inputs: at 0, and at each unit vector.
        """
        tying, device = self.old.tying, self.old.device
        dtype = self.old.target_variance.dtype
        n_layers, d_model = self.old.n_layers, self.old.d_model
        units = torch.cat([torch.zeros(1, d_model), torch.eye(d_model)]).to(device, dtype)
        written = tying.affine(units[:, None].expand(-1, n_layers, -1)).cpu().double()
        if written.dim() < 3 or len(written) == 1:  # broadcast: no skip path
            bias, skip = written.reshape(-1, n_layers, d_model)[0], None
        else:
            bias, skip = written[0], (written[1:] - written[0]).transpose(0, 1)
        # On raw inputs and outputs.
        if skip is not None:
            skip = torch.stack([self._raw_skip(skip[layer], layer) for layer in range(n_layers)])
        raw_bias = self.old_targets.restore(bias[None])[0]
        if skip is not None:
            raw_bias -= (self.old_inputs.shift[:, None] @ skip)[:, 0]
        # In the new units.
        if skip is not None:
            raw_bias += (self.inputs.shift[:, None] @ skip)[:, 0]
            skip = torch.stack([self._new_skip(skip[layer], layer) for layer in range(n_layers)])
        return self.targets.normalise(raw_bias[None])[0], skip

    def _raw_skip(self, matrix: Tensor, layer: int) -> Tensor:
        """From old units to raw ones: x_old S = (x - m) C^-1 S, times the targets' scale."""
        targets, inputs = self.old_targets.layers(layer, layer + 1), self.old_inputs.layers(layer, layer + 1)
        out = targets.raw(matrix[:, None])[:, 0]
        return out / inputs.scale[0][:, None] if inputs.inverse is None else inputs.inverse[0] @ out

    def _new_skip(self, matrix: Tensor, layer: int) -> Tensor:
        """From raw units to new ones."""
        targets, inputs = self.targets.layers(layer, layer + 1), self.inputs.layers(layer, layer + 1)
        out = targets.normalised(matrix[:, None])[:, 0]
        return out * inputs.scale[0][:, None] if inputs.inverse is None else inputs.scale[0] @ out


def _taken(side: Affine, layers: Tensor) -> Affine:
    """Some layers of a normalisation, in float64 on the CPU."""
    side = side.to("cpu", torch.float64)
    return Affine(side.shift[layers], side.scale[layers], None if side.inverse is None else side.inverse[layers])


def _times(matrix: Tensor, inputs: Affine) -> Tensor:
    """Rows on raw inputs [F, D] -> rows on normalised ones."""
    return matrix * inputs.scale[0] if inputs.inverse is None else matrix @ inputs.scale[0].T
