"""How a step's pairs fall on features: what sparse products read depends on it.

Densities are log-normal with σ 1.5, as those of trained transcoders roughly are.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import attrs
import numpy as np

SIGMA = 1.5
MOST = 0.5
"""Of the tokens, at which the busiest feature is active."""


@attrs.frozen(eq=False)
class Load:
    """Pairs of one step on this rank."""

    tokens: int
    n_layers: int
    n_features: int
    pairs: int
    density: np.ndarray
    """The share of the tokens at which each feature is active, [L · F]."""
    empty: frozenset[int] = frozenset()
    """Lists of so many places have no pairs: those of losses that select dead features while none is dead."""

    def of_places(self, places: int) -> Load:
        """The pairs in a list of so many places."""
        return attrs.evolve(self, pairs=0, density=self.density * 0) if places in self.empty else self

    @classmethod
    def of(cls, tokens: int, n_layers: int, n_features: int, pairs: int) -> Load:
        draws = np.random.default_rng(0).standard_normal(n_layers * n_features)
        density = np.exp(SIGMA * draws)
        mean = min(MOST, pairs / (tokens * n_layers * n_features))
        for _ in range(20):
            density = np.minimum(density * mean / density.mean(), MOST)
        return cls(tokens, n_layers, n_features, pairs, density)

    @property
    def targets(self) -> np.ndarray:
        """How many layers each feature writes to, [L · F]."""
        return np.repeat(self.n_layers - np.arange(self.n_layers), self.n_features)

    @property
    def active(self) -> np.ndarray:
        """The chance that a feature is active at some token of the batch, [L · F]."""
        return 1 - (1 - self.density) ** self.tokens

    def visits(self, untied: bool, *, above: int = 0) -> float:
        """Rows that a product reads: one for each pair and target.

        Args:
            above: only those of features with more pairs.
        """
        density = np.where(self.density * self.tokens > above, self.density, 0)
        return float((density * (self.targets if untied else 1)).sum() * self.tokens)

    def rows(self, untied: bool) -> float:
        """Different rows that a product reads."""
        return float((self.active * (self.targets if untied else 1)).sum())
