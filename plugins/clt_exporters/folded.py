"""A transcoder as plain matrices on raw activations, a layer at a time.

Normalised inputs are (x - m) / c and reconstructions y n + o, so with rows W [F, D] of an encoder

    pre = W (x - m) / c + b = (W / c) x + (b - W (m / c)),      y' = n_t (sum of a W_dec + b_dec) + o_t

Pre-activations keep their unit, and thresholds their values. An offset shared by all targets, (a + s) on active
features, is one of the pre-activation and of the threshold: (x + s) where x + s > θ + s.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

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
    """What its features write to its own and each later layer, [F, L - layer, D]."""
    b_dec: Tensor
    """Bias of this layer as a target, [D]."""
    W_skip: Tensor | None
    """Added to this layer as a target is x W_skip, [D, D]; None without a skip path."""


class Folder:
    """Gives the layers of a transcoder that has thresholds.

    Raises:
        ValueError: its tying adds something to active features that decoder rows cannot hold.
    """

    def __init__(self, transcoder: CrossLayerTranscoder):
        self.transcoder = transcoder
        activation: Any = transcoder.activation
        threshold = activation.threshold().detach().cpu().double()
        tying: Any = transcoder.tying
        shift = getattr(tying, "shift", lambda layer: None)
        shifts = [shift(layer) for layer in range(transcoder.n_layers)]
        none = torch.zeros_like(threshold[0])
        self.shift = torch.stack([none if each is None else each.cpu().double() for each in shifts])
        """What is added to active features, [L, F]."""
        self.threshold = threshold + self.shift
        """[L, F]; of ReLU all 0."""
        self.is_relu = not bool(threshold.any()) and not bool(self.shift.any())

    @torch.no_grad()
    def layer(self, layer: int) -> Layer:
        """One layer, in float32 (float64 where the transcoder is), on the CPU."""
        transcoder, normaliser = self.transcoder, self.transcoder.normaliser
        out = torch.promote_types(transcoder.W_enc.dtype, torch.float32)
        shift, scale, target_shift, target_scale = (
            getattr(normaliser, name)[layer:].cpu().double()
            for name in ("input_shift", "input_scale", "target_shift", "target_scale")
        )
        weight = transcoder.W_enc[layer].cpu().double()
        bias = transcoder.b_enc[layer].cpu().double() - weight @ (shift[0] / scale[0])
        rows = transcoder.tying.expand(layer).cpu().to(out) * target_scale.to(out)
        affine, skip = self._affine(layer)
        if skip is not None:
            affine = affine - (shift[0] / scale[0]) @ skip
            skip = skip / scale[0][:, None] * target_scale[0]
        return Layer(
            W_enc=(weight / scale[0]).to(out),
            b_enc=(bias + self.shift[layer]).to(out),
            threshold=None if self.is_relu else self.threshold[layer].to(out),
            W_dec=rows,
            b_dec=(affine * target_scale[0] + target_shift[0]).to(out),
            W_skip=None if skip is None else skip.to(out),
        )

    def _affine(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """b and S of what the tying adds to a target, b + x S, in normalised units: its answers to 0 and to 1s."""
        layers, width = self.transcoder.n_layers, self.transcoder.d_model
        device = self.transcoder.W_enc.device
        zero = torch.zeros(1, layers, width, dtype=torch.float64, device=device)
        bias = self.transcoder.tying.affine(zero).expand(1, layers, width)[0, layer]
        if getattr(self.transcoder.tying, "skip", None) is None:
            return bias.cpu(), None
        ones = torch.zeros(width, layers, width, dtype=torch.float64, device=device)
        ones[:, layer] = torch.eye(width, dtype=torch.float64, device=device)
        return bias.cpu(), (self.transcoder.tying.affine(ones)[:, layer] - bias).cpu()
