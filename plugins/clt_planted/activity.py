"""Which chains are active at a token, and with which values.

Shapes: B tokens, C chains, N true features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_planted import rate
from clt_planted.circuit import EMBEDDING, Truth

if TYPE_CHECKING:
    from clt_planted import PlantedConfig


def draw(config: PlantedConfig, truth: Truth, tokens: int, random: torch.Generator) -> Tensor:
    """How much of each feature the stream begins with, [B, N] float32."""
    on = _chains(config, tokens, random)
    inputs = [number for number, feature in enumerate(truth.features) if feature.layer == EMBEDDING]
    chain = torch.tensor([truth.features[number].chain for number in inputs])
    alone = chain.bincount()[chain] == 1
    active = on[:, chain] & (alone | (torch.rand(tokens, len(inputs), generator=random) < config.together))
    values = 0.5 + torch.rand(tokens, len(inputs), generator=random)
    if set(config.gates) != {"copy"}:
        values = torch.ones_like(values)
    out = torch.zeros(tokens, len(truth.features))
    out[:, inputs] = active * values
    return out


def _chains(config: PlantedConfig, tokens: int, random: torch.Generator) -> Tensor:
    """Whether each chain is active, [B, C]."""
    share, chains = rate(config), torch.arange(config.chains)
    group, member = chains // config.group, chains % config.group
    groups = int(group[-1]) + 1
    if config.activity == "independent":
        return torch.rand(tokens, config.chains, generator=random) < share
    if config.activity == "correlated":
        factors = torch.randn(tokens, groups, generator=random)
        own = torch.randn(tokens, config.chains, generator=random)
        normal = config.correlation**0.5 * factors[:, group] + (1 - config.correlation) ** 0.5 * own
        return normal > torch.special.ndtri(torch.tensor(1 - share))
    parents = torch.rand(tokens, groups, generator=random) < share
    # Number 0 is no child. The last group may be smaller.
    sizes = group.bincount()
    chosen = (torch.rand(tokens, groups, generator=random) * sizes).long()
    return parents[:, group] & ((member == 0) | (chosen[:, group] == member))
