"""Held-out numbers of a transcoder, streamed over batches.

NMSE (= FVU, fraction of variance unexplained) of a layer: mean squared error / variance of the targets, both means over
tokens and dimensions, in raw units. Explained variance: 1 - variance of the error / variance of the targets.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.model.normaliser import Moments

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.data.batch import Batch
    from clt_plugins.data.features import Features
    from clt_plugins.model.transcoder import CrossLayerTranscoder


class Scores:
    """Adds up errors, activity and the targets' variance over batches, in float64."""

    def __init__(self, layers: int, d_model: int, features: int, device: torch.device | str = "cpu"):
        self.tokens = 0
        self.error = torch.zeros(2, layers, d_model, dtype=torch.float64, device=device)
        self.targets = Moments(layers, d_model, device)
        self.counts = torch.zeros(layers, features, dtype=torch.int64, device=device)

    def add(self, batch: Batch, reconstruction: Tensor, features: Features) -> None:
        """Take a batch into account; the reconstruction [B, L, D] is in raw units."""
        error = reconstruction.double() - batch.targets.double()
        self.tokens += batch.tokens
        self.error[0] += error.sum(0)
        self.error[1] += error.square().sum(0)
        self.targets.add(batch)
        self.counts += features.counts()

    def merge(self, parallel: Parallel, features: int) -> None:
        """Make these the scores of all ranks: of all tokens, and of the features of all shards."""
        self.tokens = int(parallel.total(torch.tensor(self.tokens), over="tokens"))
        self.error = parallel.total(self.error, over="tokens")
        self.targets.total(parallel)
        whole = self.counts.new_zeros(self.counts.shape[0], features)
        own = parallel.shard(features)
        whole[:, own.start : own.stop] = self.counts
        self.counts = parallel.total(whole, over="all")

    def result(self) -> dict[str, Any]:
        """Scalars `nmse`, `explained_variance` (means over layers), `l0` (sum over layers), `dead_fraction`; the same
        by layer [L] under `..._by_layer`; and `density` [L, F], the share of tokens each feature is active at."""
        variance = self.targets.statistics()["targets.std"].square().mean(1) * (self.tokens - 1) / self.tokens
        mean, square = self.error / self.tokens
        nmse = square.mean(1) / variance
        explained = 1 - (square - mean.square()).mean(1) / variance
        density = self.counts.double() / self.tokens
        dead = (self.counts == 0).double()
        by_layer = {"nmse": nmse, "explained_variance": explained, "l0": density.sum(1), "dead_fraction": dead.mean(1)}
        out: dict[str, Any] = {name: float(value.mean()) for name, value in by_layer.items()}
        out["l0"] = float(density.sum())
        out.update({f"{name}_by_layer": value.float().cpu() for name, value in by_layer.items()})
        out["density"] = density.float().cpu()
        return out


@torch.no_grad()
def score(transcoder: CrossLayerTranscoder, batches: Iterable[Batch]) -> Scores:
    """A transcoder's scores on some batches of raw activations.

    The batches must be the same on all ranks; each data group takes every so many-th of them.
    """
    parallel = transcoder.context.parallel
    device = transcoder.normaliser.input_shift.device
    scores = Scores(transcoder.n_layers, transcoder.d_model, transcoder.W_enc.shape[1], device)
    was_training = transcoder.training
    transcoder.eval()
    try:
        with parallel.apart():
            for batch in islice(batches, parallel.data_rank, None, parallel.data_ranks):
                batch = batch.to(device)
                x = transcoder.normaliser.inputs(batch.inputs)
                features = transcoder.encode_normalised(x).features
                scores.add(batch, transcoder.normaliser.restore(transcoder.reconstruct(features, x)), features)
    finally:
        transcoder.train(was_training)
    if parallel.world > 1:
        scores.merge(parallel, transcoder.n_features)
    return scores


def evaluate_batches(transcoder: CrossLayerTranscoder, batches: Iterable[Batch]) -> dict[str, Any]:
    """`Scores.result` of a transcoder on some batches of raw activations; see `score`.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    return score(transcoder, batches).result()
