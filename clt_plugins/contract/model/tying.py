"""What `[tying]` builds: the decoder.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

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
        """What does not depend on features: bias and skip; broadcasts to [B, L, D]. `inputs` are normalised."""

    def norms(self) -> Tensor:
        """‖decoder‖ of each feature over all the layers it writes to, [L, F], detached."""

    def expand(self, layer: int) -> Tensor:
        """The decoder rows of one source layer as if untied, [F, L - layer, D], factors included, detached.

        A tying that adds something to active features before these rows is also `Shifted`.
        """

    def views(self) -> Mapping[str, tuple[str, Callable[[Tensor], Tensor], int | None]]:
        """How parameters are cut for files: name in files -> (parameter name, view of it, feature axis of the view)."""
