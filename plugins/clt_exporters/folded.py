"""A transcoder as plain matrices on raw activations, one layer at a time: see `raw_encoder` and `raw_decoder`.

Pre-activations keep their unit and thresholds their values. An offset s that all targets share is added to active
features, a + s. It becomes an offset of the pre-activation and of the threshold: (x + s) where x + s > θ + s.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import Shifted, Thresholded, raw_decoder, raw_encoder

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder


@attrs.frozen(eq=False)
class Layer:
    """One layer of a transcoder on raw activations."""

    W_enc: Tensor
    """[F, D]."""
    b_enc: Tensor
    """[F]."""
    threshold: Tensor | None
    """[F]; None for ReLU."""
    W_dec: Tensor
    """What the features write to their own layer and to each later one, [F, L - layer, D]."""
    b_dec: Tensor
    """The bias of this layer as a target, [D]."""
    W_skip: Tensor | None
    """[D, D]: this layer as a target also gets x W_skip; None without a skip path."""


class Folded:
    """A transcoder with thresholds, normalisation and offsets folded into its matrices.

    Raises:
        Refused: the tying adds offsets that decoder rows cannot hold, or the normalisation cannot be folded.
    """

    def __init__(self, transcoder: CrossLayerTranscoder):
        self.transcoder = transcoder
        self.folding = transcoder.normaliser.fold()
        activation, tying = transcoder.activation, transcoder.tying
        assert isinstance(activation, Thresholded), "`limits` has refused all others"
        threshold = activation.threshold().detach().cpu().double()
        self.shift = torch.zeros_like(threshold)
        """What is added to active features, [L, F]."""
        if isinstance(tying, Shifted):
            for layer in range(transcoder.n_layers):
                shift = tying.shift(layer)
                if shift is not None:
                    self.shift[layer] = shift.cpu().double()
        self.threshold = threshold + self.shift
        """[L, F]; all 0 for ReLU."""
        self.is_relu = not bool(threshold.any()) and not bool(self.shift.any())

    @torch.no_grad()
    def layer(self, layer: int) -> Layer:
        """One layer on the CPU, in float32, or in float64 if the transcoder is in float64."""
        out = torch.promote_types(self.transcoder.context.dtype, torch.float32)
        inputs, target = (
            side.layers(layer, layer + 1).to("cpu", torch.float64)
            for side in (self.folding.inputs, self.folding.targets)
        )
        matrix, bias = raw_encoder(self.transcoder, layer)
        affine, skip = self._affine(layer)
        if skip is not None:
            affine = affine - inputs.normalised(inputs.shift)[0] @ skip
            # x S with normalised x: columns of S read inputs, rows of it write to the target.
            skip = target.raw(inputs.readers(skip.T[:, None])[:, 0].T[:, None])[:, 0]
        return Layer(
            W_enc=matrix.to(out),
            b_enc=(bias + self.shift[layer]).to(out),
            threshold=None if self.is_relu else self.threshold[layer].to(out),
            W_dec=raw_decoder(self.transcoder, layer),
            b_dec=target.restore(affine[None])[0].to(out),
            W_skip=None if skip is None else skip.to(out),
        )

    def _affine(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """b and S of what the tying adds to a target, b + x S, in normalised units.

        A tying is known only as a function: b is its value at 0, and the rows of S are its values at unit vectors.
        """
        layers, width = self.transcoder.n_layers, self.transcoder.d_model
        device = self.transcoder.device
        zero = torch.zeros(1, layers, width, dtype=torch.float64, device=device)
        bias = self.transcoder.tying.affine(zero).expand(1, layers, width)[0, layer]
        if getattr(self.transcoder.tying, "skip", None) is None:
            return bias.cpu(), None
        ones = torch.zeros(width, layers, width, dtype=torch.float64, device=device)
        ones[:, layer] = torch.eye(width, dtype=torch.float64, device=device)
        return bias.cpu(), (self.transcoder.tying.affine(ones)[:, layer] - bias).cpu()
