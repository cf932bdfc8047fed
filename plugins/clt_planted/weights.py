"""What a transcoder's weights say of true features: which ones it reads and writes.

Shapes: L layers, D d_model, F features per layer of the transcoder, N true features, C of them computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import raw_decoder, raw_encoder

if TYPE_CHECKING:
    from clt_planted.circuit import Truth
    from clt_plugins import CrossLayerTranscoder


def reads(transcoder: CrossLayerTranscoder, truth: Truth) -> Tensor:
    """What a value of 1 of each true feature in the stream adds to each pre-activation: <encoder row, direction>, in
    raw units, [L F, N] float64.

    Raises:
        Refused: the encoder or the normalisation is no product of raw inputs.
    """
    rows = [raw_encoder(transcoder, layer)[0] for layer in range(transcoder.n_layers)]
    return torch.cat(rows).double() @ truth.directions.double().T


def rows_to(transcoder: CrossLayerTranscoder, target: int) -> Tensor:
    """What a value of 1 of each feature adds to the raw targets of a layer, [L F, D] float64; 0 for later layers."""
    out = torch.zeros(transcoder.n_layers, transcoder.n_features, transcoder.d_model, dtype=torch.float64)
    for source in range(target + 1):
        out[source] = raw_decoder(transcoder, source)[:, target - source]
    return out.flatten(0, 1)


def writes(transcoder: CrossLayerTranscoder, truth: Truth) -> tuple[Tensor, Tensor]:
    """How much of each computed true feature a value of 1 of each feature writes, and how alike the two directions are.

    The first is a coordinate: the rows of a target layer are written as sums of what the true model changes in that
    layer (least squares by the pseudo-inverse), so that features which are not orthogonal are told apart.

    Returns:
        Coordinates [C, L F]; and cosines of the rows with `Truth.written`, [C, L F]. Both float64.
    """
    computed = truth.computed()
    coordinates = torch.zeros(len(computed), transcoder.n_layers * transcoder.n_features, dtype=torch.float64)
    cosines = torch.zeros_like(coordinates)
    for layer in range(truth.n_layers):
        own = [number for number in computed if truth.features[number].layer == layer]
        if not own:
            continue
        rows = rows_to(transcoder, layer)
        removed = {parent for number in own for parent in truth.features[number].exciting if truth.consume}
        basis = truth.directions[[*own, *sorted(removed)]].double()
        index = [computed.index(number) for number in own]
        coordinates[index] = (rows @ torch.linalg.pinv(basis)).T[: len(own)]
        written = torch.stack([truth.written(number) for number in own]).double()
        unit = torch.nn.functional.normalize(written, dim=1)
        cosines[index] = unit @ torch.nn.functional.normalize(rows, dim=1).T
    return coordinates, cosines
