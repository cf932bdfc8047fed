"""Weights in groups of equal rates; and what cannot be split over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_optimizers import RatesConfig
    from clt_plugins import Context, Weight


def groups(weights: Sequence[Weight], config: RatesConfig) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weights of the same learning-rate factor and weight decay together."""
    by_rates: dict[tuple[float, float], list[Any]] = {}
    for weight in weights:
        role = config.roles.get(weight.role)
        decay = config.weight_decay if weight.rows else 0.0
        if role is not None and role.weight_decay is not None:
            decay = role.weight_decay
        factor = weight.lr_factor * (1.0 if role is None else role.lr_factor)
        by_rates.setdefault((factor, decay), []).append(weight.parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in by_rates.items()
    ]


def refuse_split(name: str, context: Context) -> None:
    """Refuse features that are split over ranks."""
    if context.parallel.tensor_ranks > 1:
        text = f'{name!r} needs all features of a matrix on one rank: set parallel.tensor = 1, or optimizer = "adam"'
        raise Refused("optimizer.name", text)
