"""Layers of pre-activations, as the kernels that select read them.

Shapes: B tokens, F features per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    tokens: int
    n_layers: int
    n_features: int
    """Of this rank."""


class Block(NamedTuple):
    """A layer, as kernels read it."""

    numbers: Tensor
    """What scores are made of, [B, F]."""
    scale: Tensor | None
    shift: Tensor | None
    pre: Tensor
    """What is kept, [B, F]."""

    @classmethod
    def of(cls, pre: Tensor, scale: Tensor | None, shift: Tensor | None, score: Tensor | None) -> Block:
        numbers = pre if score is None else score
        vectors = [x for x in (scale, shift) if x is not None]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in (numbers, *vectors)) else torch.float32
        if wide == torch.float64:
            numbers = numbers.double()
        scale, shift = (x if x is None else x.to(wide).contiguous() for x in (scale, shift))
        return cls(_rows(numbers), scale, shift, _rows(pre))

    @property
    def wide(self) -> torch.dtype:
        """The type of scores."""
        return torch.float64 if self.numbers.dtype == torch.float64 else torch.float32

    @property
    def key(self) -> torch.dtype:
        return torch.int64 if self.wide == torch.float64 else torch.int32


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
