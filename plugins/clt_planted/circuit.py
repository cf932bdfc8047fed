"""The planted model: which features there are, what computes each from which, and what is then in the stream.

    x_0 = sum of features of the embedding,    x_{l+1} = x_l + y_l,    y_l = sum of what the gates of layer l write

Chain number j begins in layer j mod (L - hops + 1) (all chains of a hierarchical group in the same one), and each of
its hops is a gate of the next layer. The first hop reads features of the embedding; each later one reads the feature
before it, and, unless it is a copy, one more of the embedding:

    copy: a,    and: 1 where a and b are,    or: 1 where a or b is,    and_not: 1 where a is and b is not

Shapes: B tokens, L layers, D d_model, N true features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins import generator

if TYPE_CHECKING:
    from clt_planted import PlantedConfig

EMBEDDING = -1
"""The layer of features that are in the stream from the beginning."""


@attrs.frozen
class TrueFeature:
    """A feature of the planted model. Its number is its index in `Truth.features`."""

    layer: int
    """The layer whose MLP computes and writes it; -1 for one of the embedding."""
    gate: str
    """"embedding", "copy", "and", "or" or "and_not"."""
    parents: tuple[int, ...]
    """The numbers of the features that it is computed from; of `and_not`, the second one prevents it."""
    chain: int
    """The chain that it belongs to."""

    @property
    def exciting(self) -> tuple[int, ...]:
        """The parents that it is active with, not without."""
        return self.parents[:1] if self.gate == "and_not" else self.parents


@attrs.frozen
class Chain:
    """Two hops, A -> B -> C: the edge from B to C, and what B comes from."""

    before: frozenset[int]
    """All features that B is computed from, directly or not."""
    parent: int
    """B."""
    child: int
    """C."""


@attrs.frozen(eq=False)
class Truth:
    """All that there is to know of a planted model."""

    n_layers: int
    consume: bool
    """Whether an active gate removes its exciting parents from the stream."""
    features: tuple[TrueFeature, ...]
    directions: Tensor
    """What a value of 1 is in the residual stream, [N, D] float32."""
    families: tuple[tuple[int, int], ...]
    """(parent, child) of hierarchical groups: a feature, and one of the same hop that is active only where it is."""

    def computed(self) -> list[int]:
        """The numbers of the features that MLPs compute: what a transcoder is to have."""
        return [number for number, feature in enumerate(self.features) if feature.layer != EMBEDDING]

    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of the whole circuit."""
        return [(parent, child) for child, feature in enumerate(self.features) for parent in feature.parents]

    def chains(self) -> list[Chain]:
        """All pairs of hops that follow each other."""
        return [
            Chain(before=self.ancestors(parent), parent=parent, child=child)
            for parent, child in self.edges()
            if self.features[parent].layer != EMBEDDING
        ]

    def ancestors(self, number: int) -> frozenset[int]:
        """The features that a feature is computed from, directly or not."""
        parents = self.features[number].parents
        return frozenset(parents).union(*(self.ancestors(parent) for parent in parents))

    def run(self, embedding: Tensor) -> Tensor:
        """How much of each feature is in the stream before each layer, and after the last one: [B, L + 1, N].

        Args:
            embedding: how much of each the stream begins with, [B, N]: 0 for those that are computed.
        """
        amounts = [embedding]
        for layer in range(self.n_layers):
            before, after = amounts[-1], amounts[-1].clone()
            for number, feature in enumerate(self.features):
                if feature.layer == layer:
                    value = _gate(feature.gate, [before[:, parent] for parent in feature.parents])
                    after[:, number] = value
                    for parent in feature.exciting if self.consume else ():
                        after[:, parent] *= value == 0
            amounts.append(after)
        return torch.stack(amounts, 1)

    def values(self, amounts: Tensor) -> Tensor:
        """The value of each feature where it comes into the stream, [B, N], from what `run` returns."""
        return torch.stack([amounts[:, one.layer + 1, number] for number, one in enumerate(self.features)], 1)

    def written(self, number: int) -> Tensor:
        """What a computed feature of value 1 adds to the stream, [D]: its direction, less those of what it removes."""
        removed = self.features[number].exciting if self.consume else ()
        return self.directions[number] - sum((self.directions[parent] for parent in removed), torch.zeros(()))


def _gate(gate: str, parents: list[Tensor]) -> Tensor:
    if gate == "copy":
        return parents[0]
    first, second = (parent > 0 for parent in parents)
    on = {"and": first & second, "or": first | second, "and_not": first & ~second}[gate]
    return on.to(parents[0].dtype)


def plant(config: PlantedConfig, seed: int) -> Truth:
    """The model of some settings: the same for the same seed."""
    features: list[TrueFeature] = []

    def add(layer: int, gate: str, parents: tuple[int, ...], chain: int) -> int:
        features.append(TrueFeature(layer, gate, parents, chain))
        return len(features) - 1

    hierarchical = config.activity == "hierarchical"
    hops: list[list[int]] = []
    for chain in range(config.chains):
        position = chain // config.group if hierarchical else chain
        start = position % (config.layers - config.hops + 1)
        last, hops_of_chain = add(EMBEDDING, "embedding", (), chain), []
        for hop in range(config.hops):
            gate = config.gates[(position + hop) % len(config.gates)]
            others = () if gate == "copy" else (add(EMBEDDING, "embedding", (), chain),)
            last = add(start + hop, gate, (last, *others), chain)
            hops_of_chain.append(last)
        hops.append(hops_of_chain)
    families = [
        (hops[chain - chain % config.group][hop], hops[chain][hop])
        for chain in range(config.chains)
        for hop in range(config.hops)
        if hierarchical and chain % config.group
    ]
    directions = _directions(len(features), config, seed)
    return Truth(config.layers, config.consume, tuple(features), directions, tuple(families))


def _directions(count: int, config: PlantedConfig, seed: int) -> Tensor:
    """[N, D], orthogonal where N <= D."""
    random = generator(seed, "planted directions")
    drawn = torch.randn(max(count, config.d_model), config.d_model, generator=random, dtype=torch.float64)
    if count <= config.d_model:
        drawn = torch.linalg.qr(drawn)[0]
    unit = torch.nn.functional.normalize(drawn[:count], dim=1)
    exponent = torch.rand(count, 1, generator=random, dtype=torch.float64) - 0.5
    return (unit * config.norms**exponent).float()
