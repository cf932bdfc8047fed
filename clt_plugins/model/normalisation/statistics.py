"""Statistics of raw activations: how they are gathered, and which of them cannot be used.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.data.moments import Moments
from clt_plugins.errors import ExitCode, Refused, Stopped

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.data.batch import Batch

SIDES = {"inputs": "MLP inputs", "targets": "MLP outputs"}


def estimate(
    batches: Iterable[Batch],
    n_layers: int,
    d_model: int,
    parallel: Parallel | None = None,
    observe: Callable[[Batch], None] | None = None,
) -> dict[str, Tensor]:
    """Statistics of some batches, of all ranks: see `Moments.statistics`; and `inputs.norm` and `targets.norm`, the
    mean over tokens of ‖activation‖, [L].

    Args:
        observe: is handed each batch too; see `Observes`.

    Raises:
        Refused: there are fewer than two tokens, or a number among them is not finite; names layer, dimension and type.
    """
    moments = Moments(n_layers, d_model)
    norms = torch.zeros(2, n_layers, dtype=torch.float64)
    unfinished = ""
    for batch in batches:
        unfinished = unfinished or not_finite(batch)
        moments.add(batch)
        for total, side in zip(norms, SIDES, strict=True):
            total += getattr(batch, side).detach().cpu().double().norm(dim=-1).sum(0)
        if observe is not None:
            observe(batch)
    if parallel is not None and parallel.data_ranks > 1:
        moments.total(parallel)
        norms = parallel.total(norms, over="tokens")
        # Each rank saw other tokens: all must refuse what one of them cannot use.
        unfinished = next(filter(None, parallel.gather(unfinished)), "")
    if unfinished:
        # One rank tells the user.
        raise Refused("source", unfinished) if parallel is None or parallel.rank == 0 else Stopped(ExitCode.USAGE, "")
    if moments.count < 2:
        raise Refused("train.statistics_tokens", f"statistics need at least 2 tokens, got {moments.count}: raise it")
    statistics = moments.statistics()
    for total, side in zip(norms, SIDES, strict=True):
        statistics[f"{side}.norm"] = total / moments.count
    return statistics


def not_finite(batch: Batch) -> str:
    """Where a batch has a number that is not finite, and what to do; "" if it has none."""
    for side, name in SIDES.items():
        x: Tensor = getattr(batch, side)
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            token, layer, dimension = bad.nonzero()[0].tolist()
            dtype = str(x.dtype).removeprefix("torch.")
            return (
                f"an activation of layer {layer} is not a finite number in {dtype}: "
                f"{float(x[token, layer, dimension])} in dimension {dimension} of its {name}: set model.dtype = "
                '"float32" or "bfloat16", or generate stored activations again'
            )
    return ""


def check_statistics(statistics: Mapping[str, Tensor], n_layers: int, d_model: int) -> None:
    """Refuse statistics, of a source or estimated, that nothing can be fitted to.

    Raises:
        Refused: they have other shapes, or are not finite, or are negative; names layer and dimension.
    """
    shape = (n_layers, d_model)
    for name, value in statistics.items():
        if value.shape not in (shape, shape[:1]):
            text = f"expected numbers of shape {shape}, got {tuple(value.shape)}"
            raise Refused("source", f"statistics {name}: {text}")
        if wrong := unusable(value, negative=name.endswith("mean")):
            raise Refused(
                "source", f"statistics {name}: {wrong}; estimate them from activations that are finite numbers"
            )


def unusable(values: Tensor, *, negative: bool, zero: bool = True) -> str:
    """The first of some statistics, [L], [L, D] or [L, D, D], that makes no sense; "" if there is none.

    Args:
        negative: whether numbers may be below 0 (means); then they may be 0 too.
        zero: whether they may be 0 (a deviation may, a scale may not).
    """
    bad = ~torch.isfinite(values)
    if not negative:
        bad |= (values < 0) if zero else (values <= 0)
    if not bool(bad.any()):
        return ""
    where = bad.nonzero()[0].tolist()
    names = zip(("layer", "dimension", "column"), where, strict=False)
    return f"{float(values[tuple(where)])} at {', '.join(f'{name} {index}' for name, index in names)}"
