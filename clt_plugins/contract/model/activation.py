"""What `[activation]` builds: which pre-activations become features, and the value of each.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Thresholded(Protocol):
    """An activation that is exactly `pre where pre > θ, else 0`."""

    def threshold(self) -> Tensor:
        """θ, [L, F], detached."""


@runtime_checkable
class Settable(Protocol):
    """A thresholded activation that a transcoder can be converted to."""

    def set_threshold(self, threshold: Tensor) -> None:
        """Take θ [L, F].

        Raises:
            Refused: it cannot hold these thresholds; says why.
        """


@runtime_checkable
class Scheduled(Protocol):
    """An activation that changes over a run, such as a k that falls."""

    def schedule(self, progress: float) -> None:
        """Called before every training step with the share of the steps that are done.

        What it does in eval mode must not depend on it.
        """


@runtime_checkable
class CountsActive(Protocol):
    """An activation through which the number of active features can be trained, though it is no smooth function."""

    def active(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """1 for each pair that is active, else 0, with a gradient by the activation's parameters.

        Args:
            pre, feature: as `Activation.__call__` gets them.
        """


@runtime_checkable
class AimsAtL0(Protocol):
    """An activation whose L0 follows from what the losses train, and that has a number for it to reach.

    The engine multiplies the terms of `Steered` losses by a factor, which rises while L0 is above the number.
    """

    def target_l0(self, progress: float) -> float | None:
        """Active features per token, over all layers, that training aims at; None: it aims at nothing, in no step.

        Args:
            progress: the share of the training steps that are done, 0 to 1.
        """


@runtime_checkable
class Follows(Protocol):
    """An activation that `AimsAtL0`, and corrects L0 itself after each training step."""

    def follow(self, excess: Tensor) -> None:
        """Change what decides L0. Nothing may be read back from the device.

        Args:
            excess: log(L0 / target) of the step, and what is added for a drift, a scalar float64; the same on every
                rank.
        """
