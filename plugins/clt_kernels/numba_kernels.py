"""The sparse products on a CPU, compiled by Numba.

Every number of a result is summed by one thread in one order, whatever the number of threads.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite.ir import FloatType, IntType
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

from clt_plugins import Layout, Pairs

FAST = {"reassoc", "contract", "nsz"}


@intrinsic
def _float_of(typing, bits):
    """The float32 with these bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], FloatType())


@intrinsic
def _bits_of(typing, x):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], IntType(32))


def _widen(x: Any) -> Any:
    """A stored number as one to compute with: bfloat16 comes as its bits."""


@overload(_widen, inline="always")
def _compile_widen(x):
    if x == types.uint16:
        return lambda x: _float_of(np.uint32(x) << np.uint32(16))
    return lambda x: x


def _narrow(x: Any, like: Any) -> Any:
    """A number as it is stored beside `like`: rounded to the nearest (even) bfloat16 where that holds bits."""


@overload(_narrow, inline="always")
def _compile_narrow(x, like):
    if like == types.uint16:

        def to_bfloat16(x, like):
            bits = _bits_of(x)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)) if x == x else np.uint16(0x7FC0)

        return to_bfloat16
    return lambda x, like: x


@njit(parallel=True, fastmath=FAST, cache=True)
def _decode(values, per_target, feature, start, F, first, step, stride, count, weight, out):
    B, L, D = out.shape
    for b in prange(B):
        out[b] = 0
        for n in range(start[b], start[b + 1]):
            s = feature[n] // F
            row = first[s] + (feature[n] - s * F) * step[s]
            for j in range(count[s]):
                v = values[n, s + j] if per_target else values[n, 0]
                w = weight[row + j * stride[s]]
                o = out[b, s + j]
                for d in range(D):
                    o[d] += v * _widen(w[d])


@njit(parallel=True, fastmath=FAST, cache=True)
def _grad_values(grad, per_target, feature, start, F, first, step, stride, count, weight, out):
    B, L, D = grad.shape
    for b in prange(B):
        for n in range(start[b], start[b + 1]):
            s = feature[n] // F
            row = first[s] + (feature[n] - s * F) * step[s]
            out[n] = 0
            for j in range(count[s]):
                w = weight[row + j * stride[s]]
                g = grad[b, s + j]
                dot = grad.dtype.type(0)
                for d in range(D):
                    dot += g[d] * _widen(w[d])
                out[n, s + j if per_target else 0] += dot


@njit(parallel=True, fastmath=FAST, cache=True)
def _grad_rows(
    values, per_target, token, order, start, F, block_first, block_step, member_start, member, dense, out, overwrite
):
    B, L, D = dense.shape
    for f in prange(F):
        acc = np.empty(D, dense.dtype)
        for k in range(len(block_first)):
            row = out[block_first[k] + f * block_step[k]]
            if overwrite:
                acc[:] = 0
            else:
                for d in range(D):
                    acc[d] = _widen(row[d])
            for m in range(member_start[k], member_start[k + 1]):
                s, t = member[m, 0], member[m, 1]
                for i in range(start[s * F + f], start[s * F + f + 1]):
                    n = order[i]
                    v = values[n, t] if per_target else values[n, 0]
                    x = dense[token[n], t]
                    for d in range(D):
                        acc[d] += v * x[d]
            for d in range(D):
                row[d] = _narrow(acc[d], row[d])


class NumbaKernels:
    """`interfaces.Kernels` for the CPU: float32 or bfloat16 weights with float32 values, or float64 with float64."""

    name = "numba"
    devices: tuple[str, ...] = ("cpu",)

    def preference(self, device: torch.device) -> int:
        """How good these are for a device; `auto` takes the highest."""
        return 10

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` [B, L, D] is overwritten."""
        wide = _wide(weight)
        result = out if out.dtype == wide and out.is_contiguous() else torch.empty(out.shape, dtype=wide)
        _set_threads()
        _decode(
            *_columns(values, wide),
            pairs.feature.numpy(),
            pairs.token_start.numpy(),
            layout.features,
            *_rows(layout),
            _array(weight),
            _array(result),
        )
        if result is not out:
            out.copy_(result)

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""
        wide = _wide(weight)
        result = out if out.dtype == wide and out.is_contiguous() else torch.empty(out.shape, dtype=wide)
        _set_threads()
        columns, per_target = _columns(result, wide)
        _grad_values(
            _array(grad.to(wide)),
            per_target,
            pairs.feature.numpy(),
            pairs.token_start.numpy(),
            layout.features,
            *_rows(layout),
            _array(weight),
            columns,
        )
        if result is not out:
            out.copy_(result)

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]; see `interfaces.Kernels`."""
        wide = _wide(out)
        blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for s in range(layout.layers):
            for j in range(layout.count[s]):
                blocks.setdefault((layout.first[s] + j * layout.stride[s], layout.step[s]), []).append((s, s + j))
        if overwrite and len(blocks) * layout.features < layout.rows:
            out.zero_()
        _set_threads()
        _grad_rows(
            *_columns(values, wide),
            pairs.token.numpy(),
            pairs.by_feature.numpy(),
            pairs.feature_start.numpy(),
            layout.features,
            np.array([k[0] for k in blocks]),
            np.array([k[1] for k in blocks]),
            np.cumsum([0] + [len(m) for m in blocks.values()]),
            np.array([m for ms in blocks.values() for m in ms]),
            _array(dense.to(wide)),
            _array(out),
            overwrite,
        )


def _set_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _wide(weight: Tensor) -> torch.dtype:
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f'kernels: "numba" takes float32, float64 and bfloat16 weights, not {weight.dtype}: use "torch"'
        )
    return torch.promote_types(weight.dtype, torch.float32)


def _array(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _columns(values: Tensor, wide: torch.dtype) -> tuple[Any, bool]:
    x = values.detach().to(wide).contiguous().numpy()
    return (x[:, None], False) if x.ndim == 1 else (x, True)


def _rows(layout: Layout) -> tuple[Any, ...]:
    return tuple(np.array(x) for x in (layout.first, layout.step, layout.stride, layout.count))
