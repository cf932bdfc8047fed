"""Where the rows of a weight lie: what an encoder and all decoders have in common, so that the same kernels serve both.

Shapes: L layers, D d_model, F features per layer, R rows of a weight.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class Layout:
    """Which rows of a weight [R, D] belong to feature f of layer s, and where they write.

    Row j (0 <= j < count[s]) of that feature is row `first[s] + f * step[s] + j * stride[s]` of the weight and
    writes to layer s + j.
    """

    n_features: int
    """F, per layer."""
    first: tuple[int, ...]
    """Row of feature 0 of each source layer."""
    step: tuple[int, ...]
    """Rows from one feature to the next."""
    stride: tuple[int, ...]
    """Rows from one target to the next."""
    count: tuple[int, ...]
    """How many targets a feature of each source layer writes to, counted from its own layer on."""
    rows: int
    """R."""

    @property
    def n_layers(self) -> int:
        return len(self.first)

    # An encoder and three decoders are four ways to fill in the five numbers above. Kernels know only the numbers.

    @classmethod
    def own_layer(cls, n_layers: int, n_features: int) -> Layout:
        """One row per feature, writing to the feature's own layer: an encoder [L, F, D]."""
        first = tuple(layer * n_features for layer in range(n_layers))
        return cls(n_features, first, (1,) * n_layers, (0,) * n_layers, (1,) * n_layers, n_layers * n_features)

    @classmethod
    def untied(cls, n_layers: int, n_features: int) -> Layout:
        """A row for each target, contiguous: [F, L - s, D] for each source layer s, one after the other."""
        first = tuple(n_features * sum(n_layers - r for r in range(s)) for s in range(n_layers))
        count = tuple(n_layers - s for s in range(n_layers))
        return cls(n_features, first, count, (1,) * n_layers, count, n_features * sum(count))

    @classmethod
    def per_source(cls, n_layers: int, n_features: int) -> Layout:
        """One row per feature, written to every target from its layer on: [L, F, D], by source."""
        own = cls.own_layer(n_layers, n_features)
        return attrs.evolve(own, count=tuple(n_layers - s for s in range(n_layers)))

    @classmethod
    def per_target(cls, n_layers: int, n_features: int) -> Layout:
        """One row per target and feature number, shared by all sources: [L, F, D], by target."""
        own = cls.per_source(n_layers, n_features)
        return attrs.evolve(own, stride=(n_features,) * n_layers)
