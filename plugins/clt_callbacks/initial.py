"""Initial values of weights: callbacks that act before the first step alone.

Shapes: B tokens, L layers, D d_model, F features per layer of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins import Training

if TYPE_CHECKING:
    from clt_callbacks import ActiveSubspaceConfig, TiedStartConfig


class TiedStart:
    """A `Callback`."""

    every = 0

    def __init__(self, config: TiedStartConfig):
        self.scale = config.scale

    def start(self, run: Training) -> None:
        """W_enc[l, f] = scale · the decoder row of (l, f) for layer l."""
        if run.step == 0:
            for layer in range(run.context.n_layers):
                rows = run.transcoder.tying.expand(layer)[:, 0]
                encoder = run.rows_for(layer, rows * self.scale)
                run.reinitialise(layer, own_features(run), encoder=encoder)


class ActiveSubspace:
    """A `Callback`.

    For the normalised inputs x of a layer: x̂ = V Vᵀ x, with V [D, d] the eigenvectors of E[x xᵀ] of the d largest
    eigenvalues. An encoder row w becomes V Vᵀ w, scaled to the norm that w had; so it can tell all inputs apart that
    differ, and no part of it is left without a signal. A decoder row for layer t is projected by the targets of t.
    """

    every = 0

    def __init__(self, config: ActiveSubspaceConfig):
        self.config = config

    def start(self, run: Training) -> None:
        """Project all rows."""
        if run.step > 0:
            return
        inputs, targets = self._projections(run)
        feature = own_features(run)
        for layer in range(run.context.n_layers):
            encoder = _projected(run.encoder(layer)[:, None], inputs[layer : layer + 1])[:, 0]
            run.reinitialise(layer, feature, encoder=encoder)
            if self.config.decoder and "decoder" in run.settable:
                # One row for all targets is projected by those of its own layer.
                rows = run.decoder(layer)
                run.reinitialise(layer, feature, decoder=_projected(rows, targets[layer : layer + rows.shape[1]]))

    @torch.no_grad()
    def _projections(self, run: Training) -> tuple[Tensor, Tensor]:
        """V Vᵀ of inputs, [L, H, H], and of targets, [L, D, D]; float64."""
        sums: list[Tensor] = []
        for batch in run.sample(self.config.tokens):
            # What rows are multiplied with: the inputs, but for encoders that transform them.
            read = run.transcoder.encoder.inputs(batch.inputs)
            for number, x in enumerate((read, batch.targets)):
                by_layer = x.double().transpose(0, 1)
                square = by_layer.transpose(1, 2) @ by_layer
                if len(sums) <= number:
                    sums.append(torch.zeros_like(square))
                sums[number] += square
        inputs, targets = (self._subspace(run.parallel.total(square, over="tokens")) for square in sums)
        return inputs, targets

    def _subspace(self, squares: Tensor) -> Tensor:
        """V Vᵀ [L, D, D] of sums of squares [L, D, D]."""
        # On the CPU, so that every rank gets the same.
        values, vectors = torch.linalg.eigh(squares.cpu())
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        before = values.cumsum(-1) - values
        kept = before < self.config.variance * values.sum(-1, keepdim=True)
        if self.config.dimensions is not None:
            kept = torch.arange(values.shape[-1]) < self.config.dimensions
        chosen = vectors * kept.expand_as(values)[:, None]
        return (chosen @ chosen.transpose(1, 2)).to(squares.device)


def own_features(run: Training) -> Tensor:
    """The numbers of this rank's features of a layer, [F]."""
    own = run.transcoder.own
    return torch.arange(own.start, own.stop, device=run.context.device)


def _projected(rows: Tensor, projections: Tensor) -> Tensor:
    """Rows [F, n, D], each projected by its own of [n, D, D]; a feature's rows keep their norm together."""
    out = torch.einsum("fnd,nde->fne", rows.double(), projections)
    before, after = (x.flatten(1).norm(dim=1) for x in (rows.double(), out))
    return out * (before / after.clamp_min(1e-300)).where(after > 0, 1.0)[:, None, None]
