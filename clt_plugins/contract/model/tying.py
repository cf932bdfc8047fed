"""What `[tying]` builds: the decoder.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.data.features import Features


class Tying(Protocol):
    """The decoder: which weights carry a feature of layer s to layer t >= s.

    It may also be `Shifted`, and have `OwnRows`.
    """

    def decode(self, features: Features) -> Tensor:
        """What the features write, [B, L, D], without bias or skip; features may be sparse or dense.

        A layer of it depends only on features of that layer and earlier ones. It must be a new tensor: bias and skip
        are added to it in place.
        """

    def affine(self, inputs: Tensor) -> Tensor:
        """What does not depend on features: bias and skip; broadcasts to [B, L, D]. `inputs` are normalised.

        Layer l of a token may depend on layers up to l of that token only.
        """

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature over all the layers it writes to, [L, F], detached."""

    def expand(self, layer: int) -> Tensor:
        """The decoder rows of one source layer as if untied, [F, L - layer, D], factors included, detached.

        A tying that adds something to active features before these rows is also `Shifted`.
        """

    def views(self) -> Mapping[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """How parameters are cut for files: name in files -> (parameter name, view of it, feature axis of the view)."""


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Shifted(Protocol):
    """A tying that adds something to active features before its decoder rows."""

    def shift(self, layer: int) -> Tensor | None:
        """What is added to the active features of a source layer, [F], or None.

        Raises:
            Refused: rows of one factor per feature and target cannot hold the tying; says why.
        """


@runtime_checkable
class OwnRows(Protocol):
    """A tying whose features have a row for their own layer that an encoder can share."""

    def own_rows(self) -> Tensor:
        """With what each feature writes to its own layer, factors included, [L, F, D]; differentiable."""


@runtime_checkable
class FeatureRows(Protocol):
    """A tying whose features have decoder rows of their own, so that callbacks can set and scale those of one."""

    def feature_rows(self, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The parameter that holds the rows of a source layer's features, and the view of it: [F, n, D].

        n is L - layer, a row for each target; or 1 where one row serves all targets. The view is also taken of tensors
        that have the parameter's shape, or length 1 instead of D.
        """
