"""What `[activation]` builds: which pre-activations become features, and the value of each.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.data.features import Pairs


class Selection(Protocol):
    """Chooses pairs while the pre-activations of a batch pass by, one layer at a time."""

    def see(self, layer: int, pre: Tensor) -> None:
        """Read one layer's pre-activations [B, F], without gradient; the block is shared, then overwritten."""

    def finish(self) -> tuple[Pairs, Tensor]:
        """After the last layer: the pairs, and the pre-activation of each, [N]; -inf for a pair that is empty."""


class Activation(Protocol):
    """Turns pre-activations into features: which pairs are kept, and the value of each.

    It may also be `Thresholded` (then it can be exported, and encoded a layer at a time), `Settable` (then it can be
    converted to) and `Scheduled` (then it changes over a run).
    """

    fixed_size: bool
    """Whether `selection` keeps the same number of pairs in every batch (TopK), or as many as pass (ReLU).
    The second kind runs dense while its features are."""

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Selection:
        """Start on a batch of B tokens.

        Every pair whose value or gradient can be non-zero must be kept.

        Args:
            norms: returns the decoder norms [L, F], detached; it costs a pass over the decoder: call it only if needed.
        """

    def __call__(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """The value of each kept pair; differentiable, never negative.

        Args:
            pre: [N] with `feature`; or [B, L, F] without.
            feature: layer * F + f of each pair, [N]; None where `pre` is dense.
        """
