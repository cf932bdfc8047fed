"""What miniatures of other tools' formats are made of: sizes, random matrices, the tools' formulas, and what `inspect`
must say.

None of this uses the code that is tested.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

L, D, F, K = 3, 6, 10, 4
MODEL = "some/model"


@attrs.frozen(eq=False)
class Truth:
    """What a miniature computes, and what `inspect` must say of it."""

    features: Callable[[Tensor], Tensor]
    """Raw inputs [B, L, D] -> features [B, L, F]."""
    outputs: Callable[[Tensor], Tensor]
    """Raw inputs [B, L, D] -> outputs [B, L, D]."""
    format: str
    tying: str = "untied"
    activation: str = "jumprelu"
    hooks: tuple[str | None, str | None] = (None, None)
    skip: bool = False
    notes: str = ""


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre * (pre > threshold)


def top(pre: Tensor, score: Tensor, k: int) -> Tensor:
    """The k features with the highest score over the last axis, of those above 0."""
    kept = torch.zeros_like(pre).scatter(-1, score.topk(k, -1).indices, 1.0)
    return pre.relu() * kept


def encoder(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W [L, F, D], b [L, F], θ [L, F]."""
    return numbers(L, F, D, seed=seed), numbers(L, F, seed=seed + 1, scale=0.3), numbers(L, F, seed=seed + 2).abs() / 2


def pairs(seed: int = 10) -> dict[tuple[int, int], Tensor]:
    """A matrix [F, D] for each pair of layers."""
    return {(s, t): numbers(F, D, seed=seed + 7 * s + t) for s in range(L) for t in range(s, L)}


def pre_of(x: Tensor, W: Tensor, b: Tensor | float) -> Tensor:
    return torch.einsum("bld,lfd->blf", x, W) + b


def across(acts: Tensor, rows: dict[tuple[int, int], Tensor], bias: Tensor) -> Tensor:
    out = bias.expand(len(acts), L, D).clone()
    for (s, t), matrix in rows.items():
        out[:, t] += acts[:, s] @ matrix
    return out
