"""From a source, or from some batches, to a transcoder whose statistics are set.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.contract.model.normalisation import Observes
from clt_plugins.distributed.reading import Reading
from clt_plugins.errors import PluginError
from clt_plugins.model.normalisation.statistics import check_statistics, estimate
from clt_plugins.model.normalisation.stored import not_finite

if TYPE_CHECKING:
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.data.batch import Batch
    from clt_plugins.model.transcoder import CrossLayerTranscoder

SMALLEST = 1e-12
"""The least variance that errors are divided by, so that a layer whose targets are constant stays finite."""

ALWAYS = "targets.std"
"""Needed whatever the normalisation: losses and metrics divide errors by the variance of the raw targets."""


def fit_to_source(
    transcoders: CrossLayerTranscoder | Sequence[CrossLayerTranscoder], source: Source, tokens: int, batch_tokens: int
) -> None:
    """Set the statistics of a transcoder, or of several that read the same: from the source's own where it has all that
    is needed, or from its first batches, which are trained on as well, and read once for all.

    Args:
        tokens: how many the statistics are estimated from, of all ranks together.
        batch_tokens: tokens of a batch, of all ranks together.

    Raises:
        Refused: the statistics, or the activations, are no finite numbers.
    """
    unfitted = []
    stored = source.statistics()
    for transcoder in transcoders if isinstance(transcoders, Sequence) else [transcoders]:
        normaliser = transcoder.normaliser
        needed = {ALWAYS, *(f"{side}.{name}" for side in ("inputs", "targets") for name in normaliser.needs)}
        if stored is not None and needed <= stored.keys() and not isinstance(normaliser, Observes):
            fit_to_statistics(transcoder, stored)
        else:
            unfitted.append(transcoder)
    if not unfitted:
        return
    state = source.state()
    reading = Reading(source, unfitted[0].context.parallel, torch.device("cpu"))
    fit_to_batches(unfitted, reading.batches(max(1, -(-tokens // batch_tokens))))
    source.load_state(state)


def fit_to_batches(
    transcoders: CrossLayerTranscoder | Sequence[CrossLayerTranscoder], batches: Iterable[Batch]
) -> None:
    """Set the statistics of a transcoder, or of several, to those of some batches, of all ranks together.

    Raises:
        Refused: see `estimate`.
    """
    several = transcoders if isinstance(transcoders, Sequence) else [transcoders]
    observing = [one.normaliser.observe for one in several if isinstance(one.normaliser, Observes)]

    def observe(batch: Batch) -> None:
        for each in observing:
            each(batch)

    first = several[0]
    statistics = estimate(batches, first.n_layers, first.d_model, first.context.parallel, observe)
    for one in several:
        fit_to_statistics(one, statistics)


@torch.no_grad()
def fit_to_statistics(transcoder: CrossLayerTranscoder, statistics: Mapping[str, Tensor]) -> None:
    """Set a transcoder's statistics; they are those of rank 0 on all ranks.

    Raises:
        Refused: see `check_statistics`.
        PluginError: what the normalisation made of them is not finite.
    """
    check_statistics(statistics, transcoder.n_layers, transcoder.d_model)
    normaliser, parallel = transcoder.normaliser, transcoder.context.parallel
    normaliser.fit(statistics)
    variance = statistics[ALWAYS].square().mean(1)
    if (mean := statistics.get("targets.mean")) is not None:
        # Targets that never vary have no variance: errors are measured by what the normalisation leaves of them.
        left = mean - normaliser.units().shift.to(mean)
        variance = torch.where(variance > 0, variance, left.square().mean(1))
    transcoder.target_variance.copy_(variance.clamp_min(SMALLEST))
    if parallel.world > 1:
        # Ranks may have other hardware, and eigenvectors differ between libraries: one rank's numbers are everybody's.
        for value in transcoder.statistics().values():
            own = value if parallel.rank == 0 else torch.zeros_like(value)
            value.copy_(parallel.total(own, over="all", what="statistics"))
    for name, value in transcoder.statistics().items():
        if wrong := not_finite(value):
            chosen = transcoder.choices["normalisation"]
            raise PluginError(
                f"normalisation: {chosen.name!r} of {chosen.choice}: `fit` set {name!r} to {wrong}",
                where=("normalisation",),
            )
