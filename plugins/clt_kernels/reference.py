"""The sparse products in PyTorch's own operations: the reference, and the fallback on devices without faster kernels.

On a GPU the number of pairs fixes every shape, and nothing is read back: pairs that do not write to a target are kept,
with value 0. On a CPU they are dropped. Sums over gathered rows are `embedding_bag`s: one thread computes each sum, in
a fixed order.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clt_plugins import Layout, Pairs, Per, TorchSelect

CHUNK = 2**24
"""Numbers in a temporary block, at most (64 MB of float32)."""


@lru_cache(maxsize=64)
def _constants(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """The layout's numbers as tensors [L]. Cached: to copy them to a GPU in each call would wait for the GPU."""
    names = "first", "step", "stride", "count"
    return {name: torch.tensor(getattr(layout, name), device=device) for name in names}


def _touched(pairs: Pairs, layout: Layout, target: Tensor | int) -> tuple[Tensor, Tensor]:
    """For each pair, the row that writes to its target (a layer, or one for each pair), and whether it exists."""
    by_pair = {name: x[pairs.layer] for name, x in _constants(layout, pairs.layer.device).items()}
    j = target - pairs.layer
    valid = (j >= 0) & (j < by_pair["count"])
    if pairs.count is not None:
        valid &= torch.arange(len(valid), device=valid.device) < pairs.count  # not the empty places
    f = pairs.feature - pairs.layer * pairs.n_features
    row = by_pair["first"] + f * by_pair["step"] + j * by_pair["stride"]
    return torch.where(valid, row, 0), valid


def _value(values: Tensor, target: Tensor | int, dtype: torch.dtype) -> Tensor:
    """The value of each pair for a target (a layer, or one for each pair), [N]."""
    if values.dim() == 1:
        return values.to(dtype)
    if isinstance(target, int):
        return values[:, target].to(dtype)
    return values.gather(1, target[:, None])[:, 0].to(dtype)


def _gather_sum(source: Tensor, row: Tensor, value: Tensor, valid: Tensor, start: Tensor) -> Tensor:
    """Sum of value · source[row] over each bag's valid entries, in float32 at least: [bags, D].

    Args:
        source: [R, D]; row, value, valid: [N], grouped by bag.
        start: where each bag begins, and the end, [bags + 1].
    """
    if len(row) == 0:
        return torch.zeros(len(start) - 1, source.shape[1], dtype=value.dtype, device=source.device)
    if source.device.type == "cpu":
        kept = valid.nonzero()[:, 0]
        start = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])[start]
        row, value = row[kept], value[kept]
    else:
        value = torch.where(valid, value, 0)
    if source.dtype == value.dtype:
        return _bags(row, source, value, start)
    # embedding_bag needs one type for both: widen the rows, a block of pairs at a time.
    out = torch.zeros(len(start) - 1, source.shape[1], dtype=value.dtype, device=source.device)
    block = max(1, CHUNK // source.shape[1])
    for low in range(0, len(row), block):
        wide = source[row[low : low + block]].to(value.dtype)
        index = torch.arange(len(wide), device=row.device)
        out += _bags(index, wide, value[low : low + block], (start - low).clamp(0, len(wide)))
    return out


def _bags(row: Tensor, source: Tensor, value: Tensor, start: Tensor) -> Tensor:
    return embedding_bag(row, source, start, mode="sum", per_sample_weights=value, include_last_offset=True)


class TorchKernels:
    """`Kernels` for any device and any floating type.

    Args:
        fixed: whether the selection has fixed sizes and reads nothing back on a CPU too, as it does on a GPU.
    """

    name = "torch"

    def __init__(self, *, fixed: bool = False):
        self.fixed = fixed

    def preference(self, device: torch.device) -> int:
        """Any faster kernels are preferred."""
        return 0

    def select(
        self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0
    ) -> TorchSelect:
        """See `Kernels.select`."""
        return TorchSelect(tokens, n_layers, n_features, k, per=per, capacity=capacity, fixed=self.fixed or None)

    @torch.no_grad()
    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` [B, L, D] is overwritten."""
        wide = _accumulator(out.dtype)
        for target in range(layout.n_layers):
            row, valid = _touched(pairs, layout, target)
            out[:, target] = _gather_sum(weight, row, _value(values, target, wide), valid, pairs.token_start)

    @torch.no_grad()
    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""
        wide = _accumulator(out.dtype)
        sums = torch.zeros_like(out, dtype=wide)
        block = max(1, CHUNK // weight.shape[1])
        for j in range(max(layout.count)):
            # Pairs without a row j may point beyond the last layer: they add 0 to the last one.
            target = (pairs.layer + j).clamp(max=layout.n_layers - 1)
            row, valid = _touched(pairs, layout, pairs.layer + j)
            kept = torch.arange(len(row), device=row.device)
            if row.device.type == "cpu":
                kept = valid.nonzero()[:, 0]
            for some in kept.split(block):
                dense = grad[pairs.token[some], target[some]].to(wide)
                dot = torch.where(valid[some], (dense * weight[row[some]].to(wide)).sum(1), 0)
                if out.dim() == 1:
                    sums[some] += dot
                else:
                    sums[some, target[some]] += dot
        out.copy_(sums)

    @torch.no_grad()
    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]; see `Kernels`."""
        wide = _accumulator(dense.dtype)
        blocks = [_block(layout, s, j) for j in range(max(layout.count)) for s in _sources(layout, j)]
        # Several sources or targets may add to one row: then sum in full width before rounding to the rows' type.
        shared = len(set(blocks)) < len(blocks) and out.dtype != wide
        sums = torch.zeros_like(out, dtype=wide) if shared else out
        if overwrite and len(set(blocks)) * layout.n_features < layout.rows:
            out.zero_()  # some rows belong to no feature
        # The first sum of a block of rows overwrites it, unless it holds something to add to.
        started: set[Block] = set() if overwrite or shared else set(blocks)
        width = max(1, CHUNK // (layout.n_layers * layout.n_features))
        for low in range(0, dense.shape[-1], width):
            part = slice(low, low + width)
            self._grad_columns(values.to(wide), pairs, layout, dense[..., part], sums[:, part], set(started))
        if shared:
            out.copy_(sums if overwrite else sums.add_(out))

    def _grad_columns(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, started: set[Block]
    ) -> None:
        """Some columns of `grad_rows`. Blocks in `started` are added to, others are overwritten first."""
        order, start = pairs.by_feature, pairs.feature_start
        source = dense.reshape(-1, dense.shape[-1]).contiguous()
        for j in range(max(layout.count)):
            target = (pairs.layer + j).clamp(max=layout.n_layers - 1)
            _, valid = _touched(pairs, layout, pairs.layer + j)
            index, value = pairs.token * layout.n_layers + target, _value(values, target, values.dtype)
            sums = _gather_sum(source, index[order], value[order], valid[order], start)
            for s in _sources(layout, j):
                first, step = block = _block(layout, s, j)
                rows = out[first : first + (layout.n_features - 1) * step + 1 : step]
                of_source = sums[s * layout.n_features : (s + 1) * layout.n_features]
                if block in started:
                    rows += of_source
                else:
                    rows.copy_(of_source)
                    started.add(block)


Block = tuple[int, int]
"""Rows of a weight, one for each feature of a source layer: the first row, and the step from feature to feature."""


def _block(layout: Layout, s: int, j: int) -> Block:
    """The rows j of source layer s."""
    return layout.first[s] + j * layout.stride[s], layout.step[s]


def _sources(layout: Layout, j: int) -> list[int]:
    """The source layers whose features have a row j."""
    return [s for s in range(layout.n_layers) if layout.count[s] > j]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
