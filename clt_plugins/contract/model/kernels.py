"""What `[kernels]` builds: selection and sparse products.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clt_plugins.contract.select import Per, Select
    from clt_plugins.data.features import Pairs
    from clt_plugins.data.layout import Layout
    from clt_plugins.data.update import AdamUpdate


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


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Preferred(Protocol):
    """Kernels that `kernels = "auto"` may take."""

    def preference(self, device: torch.device) -> int:
        """How well they suit a device; the highest number is taken. Kernels without this method count as 0."""


@runtime_checkable
class FixedSizes(Protocol):
    """Kernels that can select with sizes that do not follow the numbers; a plugin's selection need not look."""

    fixed: bool
    """Whether they do: on a GPU, where the host would have to wait for the number of what is kept."""


@runtime_checkable
class BothGradients(Protocol):
    """Kernels that compute both gradients of a product in one pass over the tokens' side."""

    def gradients(
        self,
        values: Tensor,
        pairs: Pairs,
        layout: Layout,
        weight: Tensor,
        dense: Tensor,
        grad_values: Tensor | None,
        grad_rows: Tensor,
        *,
        overwrite: bool,
        squares: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """What `Kernels.grad_values` and `Kernels.grad_rows` write, of the same dense tensor [B, L, D].

        Args:
            grad_values: [N], or [N, L] as `values`; None if only rows are wanted.
            grad_rows: [R, D].
            squares: [R] float32; gets the sum of squares of each row of `grad_rows` as it is stored afterwards. Without
                `overwrite`, those of rows that no pair touches stay.
            sums: [L * F] in at least float32; gets the sum of the values [N] of each feature: a bias's gradient.
        """


@runtime_checkable
class Updates(Protocol):
    """Kernels that update weights by Adam and read each number once; for others torch's operations do it."""

    def update_rows(self, update: AdamUpdate) -> None:
        """One step of Adam for some rows; `AdamUpdate` says what becomes of every number, but for the last digit.

        Nothing is read back from a GPU. Results do not depend on the number of threads.
        """
