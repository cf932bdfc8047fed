"""What `[kernels]` builds: selection and sparse products.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.select import Per, Select
    from clt_plugins.data.features import Pairs
    from clt_plugins.data.layout import Layout


class Kernels(Protocol):
    """Selection and sparse products for one kind of device. `layout` says which rows of a weight [R, D] a pair touches,
    and which layers of a dense [B, L, D] they belong to; `values` are [N], or [N, L] with a column per target layer.

    Sums are accumulated in at least float32 whatever the weight's type. Results do not depend on the number of
    threads. They may also be `Preferred` (then `kernels = "auto"` knows when to take them), compute `BothGradients` at
    once, and be `Updates` (then they compute Adam's update of bfloat16 weights and moments too).
    """

    name: str

    def select(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0) -> Select:
        """Start on a batch of B tokens.

        Args:
            n_features: F of this rank.
            k: how many are kept of each token (per "token") or of the whole batch (per "batch"); of all ranks together.
            capacity: places in a result of fixed size, where k needs fewer: B times as many per "token". So a k that
                falls from step to step changes no shape. Without meaning where a result is as long as what is kept.
        """

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value * their row for t. `out` [B, L, D] is overwritten."""

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value * dense[b, t]. With `overwrite`, rows that no pair
        touches become 0: `out` [R, D] may hold anything before."""
