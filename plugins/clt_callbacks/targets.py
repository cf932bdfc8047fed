"""Which layers features write to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clt_plugins import Training


def targets(run: Training) -> list[int]:
    """How many layers the features of each layer write to: all from their own on, or only their own.

    A tying with one row per feature shows it by where the rows are not 0: ask before rows are changed. All ranks ask.
    """
    n_layers = run.context.n_layers
    if "decoder" not in run.settable:
        return [n_layers - layer for layer in range(n_layers)]
    return [_targets(run, layer) for layer in range(n_layers)]


def _targets(run: Training, layer: int) -> int:
    all_later = run.context.n_layers - layer
    if run.decoder(layer).shape[1] == all_later:
        return all_later
    written = run.parallel.total((run.transcoder.tying.expand(layer) != 0).any(0).any(-1).long())
    return max(1, int((written > 0).sum()))
