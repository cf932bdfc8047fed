"""The kernels `example`: the sparse products in a few lines of PyTorch, to start from.

Shapes: B tokens, L layers, D d_model, N pairs, R rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clt_plugins import Context, Layout, Pairs, Per, Select


@frozen(kw_only=True)
class ExampleConfig:
    """Plain PyTorch, one target layer after the other. For CPUs."""


class Example:
    """`Kernels` that are also `Preferred`: `kernels = "auto"` may choose them."""

    name = "example"

    def preference(self, device: torch.device) -> int:
        """The kernels with the highest number are chosen; the built-in reference has 0."""
        return -1

    def select(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0) -> Select:
        """Finds the k best pre-activations. The engine has one in PyTorch's operations; here you can have a faster one.

        On a GPU give `fixed=True` and `capacity=capacity`: then nothing is read back.
        """
        from clt_plugins import TorchSelect

        return TorchSelect(tokens, n_layers, n_features, k, per=per)

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` is [B, L, D]."""
        sums = _wide_zeros(out)
        for touched, row, target in _touches(pairs, layout):
            value = _column(values, touched, target).to(sums.dtype)[:, None]
            sums.index_add_(0, pairs.token[touched] * layout.n_layers + target, value * weight[row].to(sums.dtype))
        out.copy_(sums.view_as(out))

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; out[n, t] where each target has a value, [N, L]."""
        sums = out.new_zeros(out.shape, dtype=_wide_zeros(out[:0]).dtype)
        for touched, row, target in _touches(pairs, layout):
            products = (grad[pairs.token[touched], target].to(sums.dtype) * weight[row].to(sums.dtype)).sum(1)
            if sums.dim() == 1:
                sums[touched] += products
            else:
                sums[touched, target] += products
        out.copy_(sums)

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]. `out` is [R, D]."""
        sums = _wide_zeros(out)
        for touched, row, target in _touches(pairs, layout):
            value = _column(values, touched, target).to(sums.dtype)[:, None]
            sums.index_add_(0, row, value * dense[pairs.token[touched], target].to(sums.dtype))
        out.copy_(sums if overwrite else sums + out)


def _touches(pairs: Pairs, layout: Layout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each distance j: the pairs that write to layer s + j, the row of each, and that layer."""
    import torch

    of = {name: torch.tensor(getattr(layout, name))[pairs.layer] for name in ("first", "step", "stride", "count")}
    feature = pairs.feature - pairs.layer * pairs.n_features
    count = len(feature) if pairs.count is None else pairs.count
    filled = torch.arange(len(feature)) < count  # what follows are empty places
    for j in range(max(layout.count)):
        touched = (filled & (of["count"] > j)).nonzero()[:, 0]
        row = of["first"] + feature * of["step"] + j * of["stride"]
        yield touched, row[touched], pairs.layer[touched] + j


def _column(values: Tensor, touched: Tensor, target: Tensor) -> Tensor:
    """The values of some pairs for their target; `values` are [N], or [N, L]."""
    return values[touched] if values.dim() == 1 else values[touched, target]


def _wide_zeros(like: Tensor) -> Tensor:
    """Zeros [rows, D] in which sums are accumulated: in at least float32, whatever the weight's type."""
    import torch

    width = like.shape[-1]
    return like.new_zeros(like.numel() // max(1, width), width, dtype=torch.promote_types(like.dtype, torch.float32))


def build(config: ExampleConfig, context: Context) -> Example:
    """Refuses a device that the kernels cannot serve; "auto" then passes over them."""
    if context.device.type != "cpu":
        raise Refused("kernels", f'"example" runs on the CPU only, not on {context.device}: use "auto"')
    return Example()


@hookimpl
def clt_kernels() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
