"""What `[encoder]` builds: the form of the pre-activations.

Shapes: B tokens, L layers, D d_model, F features per layer of this rank, H numbers that a row is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.model.tying import Tying


class Encoder(Protocol):
    """Pre-activations are products of rows: pre[b, l, f] = h[b, l] · rows[l, f] + bias[l, f], with h = inputs(x).

    So whatever h and the rows are made from, only the rows of active features get a gradient, and no pre-activation
    is kept that no selection wants. What follows the product, such as a gate, belongs to an activation.
    """

    def inputs(self, x: Tensor) -> Tensor:
        """What rows are multiplied with, h [B, L, H], in the type of x; differentiable.

        Layer l of a token may depend on layers up to l of that token only: in a language model later ones are not there
        yet.

        Args:
            x: [B, L, D], normalised; not to be changed.
        """

    def rows(self, tying: Tying) -> Tensor:
        """[L, F, H]: a parameter, whose gradient then needs no memory in each step; or computed, differentiable.

        Args:
            tying: the decoder, whose weights it may read.

        Raises:
            Refused: it does not go with this decoder; says why. Asked when a transcoder is built.
        """

    def bias(self) -> Tensor:
        """[L, F]: a parameter, or computed, differentiable."""

    def expand(self, layer: int, tying: Tying) -> tuple[Tensor, Tensor]:
        """The matrix [F, D] and the bias [F] of a layer, detached: pre = x_l · matrixᵀ + bias.

        For exporters and reports.

        Raises:
            Refused: it is no such product of its own layer's x; says why. Asked before training where it is needed.
        """

    def views(self) -> Mapping[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """How parameters are cut for files: name in files -> (parameter name, view of it, feature axis of the view)."""
