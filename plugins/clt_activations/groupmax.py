"""GroupMax: the highest pre-activation of each group of features, so that k features are kept without a sort.

Groups are neighbouring features of one layer (`groupmax` of EleutherAI's sparsify and clt-training).

Shapes: B tokens, L layers, F features per layer, G groups per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clt_plugins import Context, Pairs, Refused

if TYPE_CHECKING:
    from clt_activations import GroupMaxConfig


class GroupMax(nn.Module):
    """One feature of each of k groups is kept, at every token; kept pre-activations pass a ReLU.

    Raises:
        Refused: groups of equal size do not come out, or a rank's features end within a group.
    """

    fixed_size = True

    def __init__(self, config: GroupMaxConfig, context: Context):
        super().__init__()
        self.k, (n_layers, n_features) = config.k, (context.n_layers, context.n_features)
        groups, rest = divmod(config.k, n_layers)
        if rest or groups == 0:
            raise Refused("activation.k", f"{config.k} must be a multiple of the {n_layers} layers")
        if n_features % groups:
            text = f"{n_features} features of a layer cannot be divided into {groups} groups of one size"
            raise Refused("activation.k", f"{text}: k / layers must divide transcoder.features")
        self.size = n_features // groups
        own = context.parallel.shard(n_features)
        if own.start % self.size or own.stop % self.size:
            text = f"a rank has features {own.start} to {own.stop - 1}, which cut groups of {self.size}"
            raise Refused("activation.k", f"{text}: choose k so that groups are smaller, or another parallel.tensor")
        self.shape = n_layers, len(own)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> HighestOfGroups:
        return HighestOfGroups(tokens, *self.shape, self.size)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """Kept pre-activations below 0 become 0."""
        return pre.relu()


class HighestOfGroups:
    """The selection: L · G pairs of each token."""

    def __init__(self, tokens: int, n_layers: int, n_features: int, size: int):
        self.shape = tokens, n_layers, n_features
        self.size = size
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer: pre-activation and feature (layer * F + f) of the highest, [B, G]."""

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        tokens, _, n_features = self.shape
        highest, place = pre.view(tokens, -1, self.size).max(2)
        first = torch.arange(0, n_features, self.size, device=pre.device) + layer * n_features
        self.kept.append((highest, first + place))

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs and their pre-activations."""
        pre, feature = (torch.cat(of_layers, 1) for of_layers in zip(*self.kept, strict=True))
        tokens, width = pre.shape
        token = torch.arange(tokens, device=pre.device).repeat_interleave(width)
        return Pairs(token, feature.flatten(), *self.shape), pre.flatten()
