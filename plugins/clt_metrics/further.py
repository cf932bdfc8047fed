"""Metrics that are not on by default.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins import Batch, Context, Features, HeldOut, Scores, Step


class Cosine:
    """A `Metric` of held-out tokens: how far a reconstruction points in its target's direction, whatever its size."""

    def __init__(self, context: Context):
        self.context = context

    def step(self, step: Step) -> Mapping[str, Any]:
        return {}

    def held_out(self) -> HeldOut:
        return _CosineSums(self.context)


class _CosineSums:
    """A `HeldOut`: sums over tokens of the cosine in each layer."""

    def __init__(self, context: Context):
        self.parallel = context.parallel
        # The tokens are the last entry, so that one sum over ranks is enough.
        self.sums = torch.zeros(context.n_layers + 1, dtype=torch.float64, device=context.device)

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(reconstruction.double(), batch.targets.double(), dim=-1)
        self.sums[:-1] += cosine.sum(0)
        self.sums[-1] += batch.tokens

    def result(self, scores: Scores) -> Mapping[str, Any]:
        sums = self.parallel.total(self.sums, over="tokens")
        by_layer = (sums[:-1] / sums[-1]).float().cpu()
        return {"cosine": float(by_layer.mean()), "cosine_by_layer": by_layer}


class DecoderNorms:
    """A `Metric`: how strongly features write, by their own layer and by distance to the layer that reads."""

    def __init__(self, context: Context):
        self.context = context

    @torch.no_grad()
    def step(self, step: Step) -> Mapping[str, Any]:
        n_layers, tying = self.context.n_layers, step.transcoder.tying
        by_layer = tying.norms().double().sum(1)
        by_distance = torch.zeros_like(by_layer)
        for layer in range(n_layers):
            norms = tying.expand(layer).double().norm(dim=-1).sum(0)  # [L - layer]
            by_distance[: len(norms)] += norms
        # There are as many features in each source layer, and fewer source layers that reach far.
        sources = torch.arange(n_layers, 0, -1, device=by_layer.device)
        sums = self.context.parallel.total(torch.stack([by_layer, by_distance / sources]))
        by_layer, by_distance = (sums / self.context.n_features).float().cpu()
        return {"train/decoder_norm_by_layer": by_layer, "train/decoder_norm_by_distance": by_distance}

    def held_out(self) -> None:
        """Nothing."""


class GradientNorms:
    """A `Metric`: the norm of the gradients of all weights of a role."""

    def __init__(self, context: Context):
        self.context = context

    def step(self, step: Step) -> Mapping[str, Any]:
        squares: dict[str, Tensor] = {}
        for weight in step.weights:
            if weight.parameter.grad is not None:
                square = weight.parameter.grad.double().square().sum()
                # Of a weight that is split over ranks each has its own rows; others count once.
                split = getattr(weight.parameter, "feature_axis", None) is not None
                square = self.context.parallel.total(square) if split else square
                squares[weight.role] = squares.get(weight.role, square * 0) + square
        return {f"optim/grad_norm_{role}": float(square.sqrt()) for role, square in squares.items()}

    def held_out(self) -> None:
        """Nothing."""
