"""The matrices of a transcoder on raw activations: the normalisation is folded into encoder and decoder.

Normalised inputs are (x - m) / c and reconstructions y n + o, so with rows W [F, D] of an encoder

    pre = W (x - m) / c + b = (W / c) x + (b - W (m / c)),      y' = n_t (sum of a W_dec + b_dec) + o_t

c and n are numbers for each dimension, or matrices: `Normalisation.fold` says. Pre-activations, and so features and
thresholds, keep their values.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder


@torch.no_grad()
def raw_encoder(
    transcoder: CrossLayerTranscoder, layer: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The matrix [F, D] and the bias [F] of a layer, pre = x · matrixᵀ + bias with raw inputs x; in float64.

    Raises:
        Refused: the encoder or the normalisation is no such product; says why.
    """
    matrix, bias = (x.to(device).double() for x in transcoder.encoder.expand(layer, transcoder.tying))
    inputs = transcoder.normaliser.fold().inputs.layers(layer, layer + 1).to(device, torch.float64)
    return inputs.readers(matrix[:, None])[:, 0], bias - matrix @ inputs.normalised(inputs.shift)[0]


@torch.no_grad()
def raw_decoder(transcoder: CrossLayerTranscoder, layer: int, device: torch.device | str = "cpu") -> Tensor:
    """What a feature of a layer adds to the raw outputs of its own layer and of each later one, per unit of its value:
    [F, L - layer, D]; in float32, or in float64 if the transcoder is in float64.

    Raises:
        Refused: the normalisation cannot be folded; says why.
    """
    out = torch.promote_types(transcoder.context.dtype, torch.float32)
    targets = transcoder.normaliser.fold().targets.layers(layer).to(device, out)
    return targets.raw(transcoder.tying.expand(layer).to(device, out))
