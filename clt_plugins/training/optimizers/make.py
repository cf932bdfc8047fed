"""The weights of a run, and the optimizer that its recipe chooses for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import nn

from clt_plugins.contract.training.optimizer import Optimizer, Piece, Weight
from clt_plugins.data.random import digest
from clt_plugins.errors import WrongReturn
from clt_plugins.model.parameters import is_matrix, role_of
from clt_plugins.registry.build import build
from clt_plugins.training.optimizers.rate import set_rate, with_rate

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.transcoder import CrossLayerTranscoder


def make_optimizer(
    transcoder: CrossLayerTranscoder, recipe: Recipe, extra: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over a transcoder's parameters, at its highest rate.

    Args:
        extra: parameters of losses, by name.

    Raises:
        Refused: it cannot train these weights.
        PluginError: what it made is no optimizer of all of them.
    """
    chosen = build_optimizer(transcoder, recipe)
    weights = weights_of(transcoder, recipe.seed, extra)
    optimizer = chosen.make(weights)
    _check(chosen, optimizer, weights)
    rate = with_rate(recipe.train, transcoder.n_layers * transcoder.n_features).lr
    assert rate is not None
    set_rate(optimizer, rate)
    return optimizer


def build_optimizer(transcoder: CrossLayerTranscoder, recipe: Recipe) -> Optimizer:
    """The recipe's choice for `[optimizer]`."""
    return build(recipe.optimizer, attrs.evolve(transcoder.context, recipe=recipe))


def _check(chosen: Optimizer, optimizer: torch.optim.Optimizer, weights: Sequence[Weight]) -> None:
    """Raise `WrongReturn` where a weight would silently not be trained, or twice."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise WrongReturn(chosen, f"make must return a torch.optim.Optimizer, got {optimizer!r:.200}")
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wrong = [weight.name for weight in weights if grouped.count(id(weight.parameter)) != 1]
    if wrong:
        raise WrongReturn(chosen, f"every weight must be in one group of the optimizer: {', '.join(wrong)}")


def weights_of(
    transcoder: CrossLayerTranscoder, seed: int = 0, extra: Mapping[str, nn.Parameter] | None = None
) -> list[Weight]:
    """All weights of a run that are trained, each with its role and pieces.

    Args:
        extra: parameters of losses, by name.
    """
    by_name = {**dict(transcoder.named_parameters()), **(extra or {})}
    by_name = {name: p for name, p in by_name.items() if p.requires_grad}  # others are frozen
    pieces = _pieces(transcoder, seed, by_name)
    weights = []
    for name, p in by_name.items():
        rows = is_matrix(p, transcoder.d_model)
        factor = getattr(p, "lr_factor", 1.0)
        weight = Weight(
            name=name, parameter=p, role=role_of(name, rows), rows=rows, lr_factor=factor, pieces=pieces[name]
        )
        weights.append(weight)
    return weights


def _pieces(transcoder: CrossLayerTranscoder, seed: int, by_name: Mapping[str, nn.Parameter]) -> dict[str, list[Piece]]:
    """How parameters are cut: as in files, where they are the same for any number of ranks."""

    def key(name: str) -> int:
        return digest(seed, "rounding", name) % 2**32

    found: dict[str, list[Piece]] = {name: [] for name in by_name}
    for name, (owner, view, axis) in transcoder.views().items():
        if owner not in found:
            continue
        found[owner].append(Piece(name, key(name), view, axis, transcoder.own, transcoder.n_features))
    for name, p in by_name.items():
        # Only shapes are asked for.
        shape = torch.empty(p.shape, dtype=p.dtype, device="meta")
        parts = [piece.view(shape) for piece in found[name]]
        # A plugin's view may be transposed or leave something out; and losses have none.
        if sum(x.numel() for x in parts) != p.numel() or not all(x.is_contiguous() for x in parts):
            axis = getattr(p, "feature_axis", None)
            found[name] = [Piece(name, key(name), axis=axis, own=transcoder.own, features=transcoder.n_features)]
    return found
