"""The sparse products on a CPU, compiled by Numba: prepares tensors for the loops of `loops`.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from clt_kernels.cpu import loops
from clt_kernels.cpu import update as adam
from clt_kernels.cpu.select import NumbaSelect
from clt_kernels.cpu.threads import use_threads
from clt_plugins import AdamUpdate, Layout, Pairs, Per, Refused

Plan = tuple[Any, Any, Any, Any]
"""(block_start, blocks, source_start, sources): blocks of rows by target.

Target t has the blocks `block_start[t] : block_start[t + 1]`. `blocks` [K, 3] holds the first row, the rows from one
feature to the next, and whether no earlier target uses the block. `sources[source_start[k] : source_start[k + 1]]` are
the source layers that use block k for this target."""

TILE = 2**20
"""Numbers in a slice of a dense [B, L, D]: 4 MB of float32, to fit the last cache."""
WIDEST, NARROWEST = 512, 128
"""Columns of a slice, at most and at least."""
PER_THREAD = 2**19
"""Multiplications worth a thread of their own."""


class NumbaKernels:
    """`Kernels` for the CPU: float32 and bfloat16 weights, computed in float32; and float64 weights."""

    name = "numba"

    def __init__(self) -> None:
        self.grouped: WeakKeyDictionary[Pairs, tuple[Any, Any, Any]] = WeakKeyDictionary()
        """The results of `_group` for pairs that are alive."""

    def preference(self, device: torch.device) -> int:
        """Faster than `torch` on the CPU, the only device that they are built for."""
        return 10

    def select(
        self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0
    ) -> NumbaSelect:
        """See `Kernels.select`."""
        return NumbaSelect(tokens, n_layers, n_features, k, per=per, threads=torch.get_num_threads())

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` [B, L, D] is overwritten."""
        wide, threads = _wide(weight), _threads(pairs, layout, out)
        order, tokens, start = self._group(pairs)
        result = out if out.dtype == wide and out.is_contiguous() else torch.empty(out.shape, dtype=wide)
        width = _width(result)
        # A unit of work of `decode` is a slice: make enough slices for the threads. Columns are independent.
        while width > NARROWEST and -(-out.shape[2] // width) * layout.n_layers < 2 * threads:
            width = _round(width // 2)
        columns = _columns(values, wide)[order]
        per_target, plan = values.dim() == 2, _plan(layout)
        loops.decode(
            columns, per_target, tokens, start, layout.n_features, plan, _array(weight), _array(result), width, threads
        )
        if result is not out:
            out.copy_(result)

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""
        wide, threads = _wide(weight), _threads(pairs, layout, grad)
        order, tokens, start = self._group(pairs)
        dense = grad.to(wide)
        columns = np.zeros_like(_columns(out, wide))
        per_target, plan = out.dim() == 2, _plan(layout)
        loops.grad_values(
            _array(dense),
            per_target,
            tokens,
            start,
            layout.n_features,
            plan,
            _array(weight),
            columns,
            _width(grad),
            threads,
        )
        result = np.zeros_like(columns)
        result[order] = columns[: len(order)]
        out.copy_(torch.from_numpy(result).view(out.shape))

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]; see `Kernels`."""
        wide, threads = _wide(out), _threads(pairs, layout, dense)
        order, tokens, start = self._group(pairs)
        plan = _plan(layout)
        result = out
        if overwrite and int(plan[1][:, 2].sum()) * layout.n_features < layout.rows:
            out.zero_()  # some rows belong to no feature
        if not out.is_contiguous() or (out.dtype != wide and not plan[1][:, 2].all()):
            # Several targets add to one row: sum in full width before rounding to the rows' type.
            result = out.to(wide).contiguous()
        columns = _columns(values, wide)[order]
        loops.grad_rows(
            columns,
            values.dim() == 2,
            tokens,
            start,
            layout.n_features,
            plan,
            overwrite,
            _array(dense.to(wide)),
            _array(result),
            _width(dense),
            threads,
        )
        if result is not out:
            out.copy_(result)

    def update_rows(self, update: AdamUpdate) -> None:
        """See `Updates.update_rows`; results have the bits of the engine's own."""
        threads = use_threads(update.weight.numel() // PER_THREAD)
        scalars = update.scalars.numpy()
        key = (update.key + int(scalars[4]) * int(adam.GOLDEN)) & 0xFFFFFFFF
        flat = [_array(x).reshape(-1) for x in (update.weight, update.grad, update.mean, update.square)]
        low = np.zeros(1, np.bool_) if update.low is None else _array(update.low).reshape(-1)
        settings = [1 - update.beta1, update.beta2, 1 - update.beta2, update.eps, update.weight_decay]
        adam.update(
            flat[0],
            low,
            *flat[1:],
            scalars,
            np.array(settings, np.float32),
            update.weight.shape[1],
            np.array([update.first, update.period, update.stride]),
            np.uint32(key),
            threads,
        )

    def _group(self, pairs: Pairs) -> tuple[Any, Any, Any]:
        """The pairs in feature order, without empty places: order, tokens, where features begin [L * F + 1].

        Computed once for the three products of a step.
        """
        if pairs not in self.grouped:
            count = None if pairs.count is None else int(pairs.count)  # without the empty places
            token, feature = pairs.token[:count].numpy(), pairs.feature[:count].numpy()
            self.grouped[pairs] = loops.group_by_feature(token, feature, pairs.n_layers * pairs.n_features)
        return self.grouped[pairs]


@lru_cache(maxsize=64)
def _plan(layout: Layout) -> Plan:
    block_start, blocks, source_start, sources = [0], [], [0], []
    seen: set[tuple[int, int]] = set()
    for t in range(layout.n_layers):
        of_target: dict[tuple[int, int], list[int]] = {}
        for s in range(t + 1):
            if t - s < layout.count[s]:
                of_target.setdefault((layout.first[s] + (t - s) * layout.stride[s], layout.step[s]), []).append(s)
        for block, users in of_target.items():
            blocks.append((*block, block not in seen))
            sources += users
            source_start.append(len(sources))
        seen |= set(of_target)
        block_start.append(len(blocks))
    return tuple(np.array(x, np.int64) for x in (block_start, blocks, source_start, sources))  # type: ignore[return-value]


def _threads(pairs: Pairs, layout: Layout, dense: Tensor) -> int:
    """Set how many threads a product gets, and return it.

    Args:
        dense: [B, L, D].
    """
    # Each source layer writes to half of the layers on average.
    multiplications = len(pairs.token) * dense.shape[2] * (layout.n_layers + 1) // 2
    return use_threads(multiplications // PER_THREAD)


def _width(dense: Tensor) -> int:
    """Columns of a slice of a dense [B, L, D]: slices of about equal width that fit the cache."""
    tokens, _, d_model = dense.shape
    most = min(max(TILE // max(tokens, 1), NARROWEST), WIDEST)
    return _round(-(-d_model // -(-d_model // most)))


def _round(width: int) -> int:
    """Up to a whole number of cache lines."""
    return -(-width // 16) * 16


def _wide(weight: Tensor) -> torch.dtype:
    """The type to compute in."""
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise Refused("kernels", f'"numba" computes float32, float64 and bfloat16, not {weight.dtype}: use "torch"')
    return torch.promote_types(weight.dtype, torch.float32)


def _array(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _columns(values: Tensor, wide: torch.dtype) -> Any:
    """[N, 1] or [N, L]."""
    x = values.detach().to(wide)
    return (x[:, None] if x.dim() == 1 else x).contiguous().numpy()
