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

    Groups of a layer have the same size, or one feature less.

    Raises:
        Refused: k is no multiple of the layers, or a rank's features end within a group.
    """

    fixed_size = True

    def __init__(self, config: GroupMaxConfig, context: Context):
        super().__init__()
        self.k, (n_layers, n_features) = config.k, (context.n_layers, context.n_features)
        groups, rest = divmod(config.k, n_layers)
        if rest or groups == 0:
            raise Refused("activation.k", f"{config.k} must be a multiple of the {n_layers} layers")
        if groups > n_features:
            raise Refused("activation.k", f"{config.k} is more than the {n_layers * n_features} features")
        own = context.parallel.shard(n_features)
        starts = torch.arange(groups + 1) * n_features // groups
        bounds = set(starts.tolist())
        if own.start not in bounds or own.stop not in bounds:
            text = f"a rank has features {own.start} to {own.stop - 1}, which cut a group in two"
            raise Refused("activation.k", f"{text}: choose a k that gives whole groups, or another parallel.tensor")
        starts = starts[(starts >= own.start) & (starts <= own.stop)] - own.start
        widest = int(starts.diff().max())
        columns = starts[:-1, None] + torch.arange(widest)
        self.columns: Tensor | None
        """The features of each group [G, size], where sizes differ; a place too many repeats the last."""
        even = bool((starts.diff() == widest).all())
        columns = columns.minimum(starts[1:, None] - 1).to(context.device)
        self.register_buffer("columns", None if even else columns, persistent=False)
        self.groups = len(starts) - 1
        self.shape = n_layers, len(own)

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> HighestOfGroups:
        return HighestOfGroups(tokens, *self.shape, self.groups, self.columns)

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """Kept pre-activations below 0 become 0."""
        return pre.relu()


class HighestOfGroups:
    """The selection: L · G pairs of each token.

    Args:
        columns: the features of each group, [G, size]; None where all have the same size.
    """

    def __init__(self, tokens: int, n_layers: int, n_features: int, groups: int, columns: Tensor | None):
        self.shape = tokens, n_layers, n_features
        self.groups, self.columns = groups, columns
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer: pre-activation and feature (layer * F + f) of the highest, [B, G]."""

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        tokens, _, n_features = self.shape
        if self.columns is None:
            highest, place = pre.view(tokens, self.groups, -1).max(2)
            feature = torch.arange(0, n_features, n_features // self.groups, device=pre.device) + place
        else:
            highest, place = pre[:, self.columns].max(2)
            feature = self.columns[:, 0] + place.minimum(self.columns[:, -1] - self.columns[:, 0])
        self.kept.append((highest, feature + layer * n_features))

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs and their pre-activations."""
        pre, feature = (torch.cat(of_layers, 1) for of_layers in zip(*self.kept, strict=True))
        tokens, width = pre.shape
        token = torch.arange(tokens, device=pre.device).repeat_interleave(width)
        return Pairs(token, feature.flatten(), *self.shape), pre.flatten()
