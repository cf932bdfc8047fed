"""The kernels `example`: the three sparse products in a few lines of PyTorch, to start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from clt_plugins import Context, Layout, Pairs


@frozen(kw_only=True)
class ExampleConfig:
    """Plain PyTorch, one target layer after the other. For CPUs."""


class Example:
    name = "example"

    def preference(self, device: torch.device) -> int:
        """What `kernels = "auto"` compares; the built-in reference has 0."""
        return -1

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t."""
        sums = _wide_zeros(out)
        for kept, row, target in _touches(pairs, layout):
            place = pairs.token[kept] * layout.n_layers + target
            sums.index_add_(
                0, place, _column(values, kept, target).to(sums.dtype)[:, None] * weight[row].to(sums.dtype)
            )
        out.copy_(sums.view_as(out))

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; [N, L] where each target has a value of its own."""
        sums = out.new_zeros(out.shape, dtype=_wide_zeros(out[:0]).dtype)
        for kept, row, target in _touches(pairs, layout):
            found = (grad[pairs.token[kept], target].to(sums.dtype) * weight[row].to(sums.dtype)).sum(1)
            if sums.dim() == 1:
                sums[kept] += found
            else:
                sums[kept, target] += found
        out.copy_(sums)

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]."""
        sums = _wide_zeros(out)
        for kept, row, target in _touches(pairs, layout):
            value = _column(values, kept, target).to(sums.dtype)[:, None]
            sums.index_add_(0, row, value * dense[pairs.token[kept], target].to(sums.dtype))
        out.copy_(sums if overwrite else sums + out)


def _touches(pairs: Pairs, layout: Layout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each distance j: which pairs write to layer s + j, by which row, and that layer."""
    import torch

    of = {name: torch.tensor(getattr(layout, name))[pairs.layer] for name in ("first", "step", "stride", "count")}
    feature = pairs.feature - pairs.layer * pairs.n_features
    for j in range(max(layout.count)):
        kept = (of["count"] > j).nonzero()[:, 0]
        row = of["first"] + feature * of["step"] + j * of["stride"]
        yield kept, row[kept], pairs.layer[kept] + j


def _column(values: Tensor, kept: Tensor, target: Tensor) -> Tensor:
    return values[kept] if values.dim() == 1 else values[kept, target]


def _wide_zeros(like: Tensor) -> Tensor:
    """Sums are accumulated in at least float32: [rows, D]."""
    import torch

    width = like.shape[-1]
    return like.new_zeros(like.numel() // max(1, width), width, dtype=torch.promote_types(like.dtype, torch.float32))


def build(config: ExampleConfig, context: Context) -> Example:
    if context.device.type != "cpu":
        raise Refused("kernels", f'"example" runs on the CPU only, not on {context.device}: use "auto"')
    return Example()


@hookimpl
def clt_kernels() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
