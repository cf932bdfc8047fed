"""The k best pre-activations of a batch: what `Kernels.select` gives.

Shapes: B tokens, L layers, F features per layer (of this rank), N places of a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import attrs

if TYPE_CHECKING:
    from torch import Tensor

Per = Literal["token", "batch"]
"""What the k best are of: each token, or the whole batch."""


@attrs.frozen(eq=False)
class Kept:
    """The pairs that are kept, by token, then by feature."""

    token: Tensor
    """[N] int64, ascending."""
    feature: Tensor
    """[N] int64: layer * F + f, ascending within a token."""
    pre: Tensor
    """The pre-activation of each, [N], of the type that was seen."""
    count: Tensor | None = None
    """How many of the N are pairs, a scalar int64 on the device; None: all. The places behind are empty: last token,
    last feature, a pre-activation of -inf."""


class Ranks(Protocol):
    """The ranks that keep the best of all together, and what part of the batch this one has.

    Between equal scores decides the order of one process: by
    `(layer * tokens + first_token + token) * features + first_feature + f`; per token without the token.
    """

    tokens: int
    """Of the batch, on all ranks; this rank's own B where each token has its own k best."""
    first_token: int
    """Where this rank's tokens begin among them."""
    features: int
    """Of each layer, on all ranks."""
    first_feature: int
    """Where this rank's features begin among them."""

    def total(self, counts: Tensor) -> Tensor:
        """The sum of an integer tensor over the ranks: a collective. All call it equally often, with equal shapes."""

    def among(self, score: Tensor, ids: Tensor, k: int) -> Tensor:
        """Which of this rank's best are among the k best of all ranks in each row: a mask [R, C]; by `total` alone.

        Args:
            score: [R, C], R = 1 for a batch, B of each token; C may differ between ranks. NaN counts as +inf; -inf
                marks an empty column, never kept.
            ids: [R, C] int64, of this rank: (layer * B + token) * F + f for a batch, layer * F + f of each token.
        """


class Select(Protocol):
    """Finds the k best pre-activations of each token or of a batch, which come one layer at a time.

    They are compared by their score, `pre * scale + shift`, computed in at least the type of scale and shift. Exact: of
    equal scores the one of the lower layer is kept, then of the lower token, then of the lower feature. So the result
    depends on nothing but the numbers: not on threads, nor on how many ranks there are. NaN counts as +inf, so that it
    is seen and not lost, and -0 as 0. A score of -inf is never kept; there may then be fewer than k.

    On a CPU a result is as long as what is kept. On a GPU nothing is read back: a result has a fixed size, and `count`
    lies on the device.
    """

    def see(
        self,
        layer: int,
        pre: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """Consider a layer. Layers ascend from call to call; some may be left out.

        Args:
            pre: pre-activations [B, F], of any strides; overwritten after the call.
            scale: [F], a factor in the score; None: 1.
            shift: [F], a summand; None: 0.
            score: [B, F], the score itself, in place of `pre` with scale and shift.
        """

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """After the last layer: what is kept.

        Args:
            ranks: of several ranks; then the best of all ranks are kept, and a rank returns those that it has.
        """
