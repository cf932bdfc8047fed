"""How well a transcoder does on held-out tokens, summed over batches.

NMSE (= FVU, fraction of variance unexplained) of a layer: mean squared error / variance of the targets, both means over
tokens and dimensions, in raw units. Explained variance: 1 - variance of the error / variance of the targets.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.contract.results.scores import Scores
from clt_plugins.data.moments import Moments
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.training.metric import HeldOut
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features
    from clt_plugins.model.transcoder import CrossLayerTranscoder

CONSTANT_BELOW = 1e-24
"""Targets whose variance is below this share of their mean square count as constant. Rounding in float64 gives about
1e-32; a single float32 that differs by its last bit, among a million, gives 1e-21."""


class ScoreSums:
    """Sums of errors, activity and the targets' moments over batches, in float64.

    Args:
        n_features: F, of this rank.
    """

    def __init__(self, n_layers: int, d_model: int, n_features: int, device: torch.device | str = "cpu"):
        self.tokens = 0
        self.error = torch.zeros(2, n_layers, d_model, dtype=torch.float64, device=device)
        self.targets = Moments(n_layers, d_model, device)
        self.counts = torch.zeros(n_layers, n_features, dtype=torch.int64, device=device)

    def add(self, batch: Batch, reconstruction: Tensor, features: Features) -> None:
        """Add a batch; the reconstruction [B, L, D] is in raw units."""
        # float64: the variance of an error is the difference of two sums of nearly equal size.
        error = reconstruction.double() - batch.targets.double()
        self.tokens += batch.tokens
        self.error[0] += error.sum(0)
        self.error[1] += error.square().sum(0)
        self.targets.add(batch)
        self.counts += features.counts()

    def merge(self, parallel: Parallel, n_features: int) -> None:
        """Make these the sums of all ranks: of all tokens, and of the features of all shards.

        Args:
            n_features: F, of all ranks together.
        """
        self.tokens = int(parallel.total(torch.tensor(self.tokens), over="tokens"))
        self.error = parallel.total(self.error, over="tokens")
        self.targets.total(parallel)
        # Each rank puts its shard into zeros, so one sum both joins shards and adds tokens.
        counts = self.counts.new_zeros(self.counts.shape[0], n_features)
        owned = parallel.shard(n_features)
        counts[:, owned.start : owned.stop] = self.counts
        self.counts = parallel.total(counts, over="all")

    def result(self) -> Scores:
        """The scores.

        Raises:
            Refused: there were fewer than two tokens, so there is no variance.
        """
        if self.tokens < 2:
            raise Refused(
                "source",
                f"yields {self.tokens} held-out tokens to score on, but a variance needs 2: "
                "raise train.eval_tokens, evaluate's `tokens` or convert's `calibration_tokens`, or hold out more text",
            )
        targets = self.targets.statistics()
        # The population's variance, as the error is averaged over all tokens too: a mean prediction has NMSE 1.
        variance = targets["targets.std"].square().mean(1) * (self.tokens - 1) / self.tokens
        varies = variance > CONSTANT_BELOW * targets["targets.rms"].square()
        mean, square = self.error / self.tokens
        nmse = (square.mean(1) / variance).where(varies, torch.nan)
        explained = (1 - (square - mean.square()).mean(1) / variance).where(varies, torch.nan)
        # float32, as they are reported: a quotient that overflows there is not defined either.
        scored = nmse.float().isfinite() & explained.float().isfinite()
        nmse, explained = nmse.where(scored, torch.nan), explained.where(scored, torch.nan)
        undefined = {
            layer: _reason(bool(variance[layer].isfinite()), bool(varies[layer]))
            for layer in (~scored).nonzero().flatten().tolist()
        }
        density = self.counts.double() / self.tokens
        dead = (self.counts == 0).double()

        def by_layer(numbers: Tensor) -> Tensor:
            return numbers.float().cpu()

        return Scores(
            tokens=self.tokens,
            nmse=float(nmse[scored].mean()),
            explained_variance=float(explained[scored].mean()),
            l0=float(density.sum()),
            dead_fraction=float(dead.mean(1).mean()),
            nmse_by_layer=by_layer(nmse),
            explained_variance_by_layer=by_layer(explained),
            l0_by_layer=by_layer(density.sum(1)),
            dead_fraction_by_layer=by_layer(dead.mean(1)),
            density=by_layer(density),
            target_mean=targets["targets.mean"],
            undefined=undefined,
        )


def _reason(finite: bool, varies: bool) -> str:
    """Why a layer has no score.

    Args:
        finite, varies: of its targets.
    """
    if not finite:
        return "among its held-out targets are numbers that are not finite (in float16: set model.dtype)"
    return "its reconstruction is not finite" if varies else "its held-out targets are constant"


@torch.no_grad()
def score(transcoder: CrossLayerTranscoder, batches: Iterable[Batch], others: Sequence[HeldOut] = ()) -> Scores:
    """A transcoder's scores, in eval mode, on some batches of raw activations.

    All ranks must iterate over the same batches. Data rank d of n scores batches d, d + n, d + 2n, ...

    Args:
        others: metrics that see the same pass.

    Raises:
        Refused: the batches have fewer than two tokens.
    """
    parallel = transcoder.context.parallel
    device = transcoder.device
    sums = ScoreSums(transcoder.n_layers, transcoder.d_model, transcoder.shape[1], device)
    # Eval mode: an annealed k is at its final value.
    was_training = transcoder.training
    transcoder.eval()
    try:
        # Data ranks take whole batches in turn: held-out batches are not divided, their sizes may be odd.
        with parallel.apart():
            for batch in islice(batches, parallel.data_rank, None, parallel.data_ranks):
                batch = batch.to(device)
                x = transcoder.normaliser.inputs(batch.inputs)
                features = transcoder.encode_normalised(x).features
                reconstruction = transcoder.normaliser.restore(transcoder.reconstruct(features, x))
                sums.add(batch, reconstruction, features)
                for other in others:
                    other.add(batch, features, reconstruction)
    finally:
        transcoder.train(was_training)
    if parallel.world > 1:
        sums.merge(parallel, transcoder.n_features)
    return sums.result()
