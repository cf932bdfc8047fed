"""The sparse products on a CUDA GPU, compiled by Triton. Tested under Triton's interpreter; not yet run on a GPU.

One program computes each number of a result, in a fixed order and without atomics, so that results do not change from
run to run. Nothing is read back from the device, and the number of programs depends only on shapes.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clt_plugins import Layout, Pairs, Per, TorchSelect

WIDEST = 1024
"""Columns of one program, at most."""


@triton.jit
def _decode(
    out, values, token_start, feature, weight, first, step, stride, count,
    L: tl.constexpr, F: tl.constexpr, D: tl.constexpr, PER_TARGET: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out[b, t, columns]: one program each, over the pairs of token b."""
    # In int64: B * L * D may be more than 2^31 numbers.
    b = tl.program_id(0).to(tl.int64) // L
    t = tl.program_id(0).to(tl.int64) % L
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < D
    total = tl.zeros([WIDTH], dtype=WIDE)
    for n in range(tl.load(token_start + b), tl.load(token_start + b + 1)):
        number = tl.load(feature + n)
        s = number // F
        j = t - s
        if (j >= 0) & (j < tl.load(count + s)):
            row = tl.load(first + s) + number % F * tl.load(step + s) + j * tl.load(stride + s)
            value = tl.load(values + (n * L + t if PER_TARGET else n)).to(WIDE)
            total += value * tl.load(weight + row * D + column, mask=inside, other=0).to(WIDE)
    tl.store(out + (b * L + t) * D + column, total, mask=inside)


@triton.jit
def _grad_values(
    out, grad, token, feature, weight, first, step, stride, count,
    L: tl.constexpr, F: tl.constexpr, D: tl.constexpr, PER_TARGET: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """out[n] (or out[n, t] for its targets): one program for each pair, over its rows."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.load(token + n)
    number = tl.load(feature + n)
    s = number // F
    row = tl.load(first + s) + number % F * tl.load(step + s)
    total = tl.zeros([WIDTH], dtype=WIDE)
    for j in range(tl.load(count + s)):
        for low in range(0, D, WIDTH):
            column = low + tl.arange(0, WIDTH)
            inside = column < D
            dense = tl.load(grad + (b * L + s + j) * D + column, mask=inside, other=0).to(WIDE)
            total += dense * tl.load(weight + row * D + column, mask=inside, other=0).to(WIDE)
        row += tl.load(stride + s)
        if PER_TARGET:
            tl.store(out + n * L + s + j, tl.sum(total))
            total = tl.zeros([WIDTH], dtype=WIDE)
    if not PER_TARGET:
        tl.store(out + n, tl.sum(total))


@triton.jit
def _grad_rows(
    out, values, token, by_feature, feature_start, dense, bases, steps, use_start, sources, targets,
    L: tl.constexpr, F: tl.constexpr, D: tl.constexpr, PER_TARGET: tl.constexpr, OVERWRITE: tl.constexpr,
    WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row of a block, some columns: one program each, over the (source, target)s that use the block."""
    k = tl.program_id(0).to(tl.int64) // F
    f = tl.program_id(0).to(tl.int64) % F
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < D
    address = out + (tl.load(bases + k) + f * tl.load(steps + k)) * D + column
    total = tl.zeros([WIDTH], dtype=WIDE)
    if not OVERWRITE:
        total += tl.load(address, mask=inside, other=0).to(WIDE)
    for m in range(tl.load(use_start + k), tl.load(use_start + k + 1)):
        number = tl.load(sources + m) * F + f
        t = tl.load(targets + m)
        for i in range(tl.load(feature_start + number), tl.load(feature_start + number + 1)):
            n = tl.load(by_feature + i)
            value = tl.load(values + (n * L + t if PER_TARGET else n)).to(WIDE)
            first = (tl.load(token + n) * L + t) * D
            total += value * tl.load(dense + first + column, mask=inside, other=0).to(WIDE)
    tl.store(address, total.to(out.dtype.element_ty), mask=inside)


class TritonKernels:
    """`Kernels` for CUDA GPUs: float32, float64, bfloat16 and float16 weights."""

    name = "triton"

    def preference(self, device: torch.device) -> int:
        """Faster than `torch` on a GPU; on a CPU only the interpreter runs them."""
        return 10 if device.type == "cuda" else -1

    def select(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, room: int = 0) -> TorchSelect:
        """See `Kernels.select`."""
        return TorchSelect(tokens, n_layers, n_features, k, per=per, room=room, fixed=True)

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` [B, L, D] is overwritten."""
        tokens, layers, d_model = out.shape
        width = _width(d_model)
        result = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        _decode[(tokens * layers, -(-d_model // width))](
            result, values.contiguous(), pairs.token_start, pairs.feature, weight, *_rows(layout, out.device),
            L=layers, F=layout.n_features, D=d_model, PER_TARGET=values.dim() == 2, WIDTH=width, WIDE=_wide(weight),
        )  # fmt: skip
        if result is not out:
            out.copy_(result)

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""
        _, layers, d_model = grad.shape
        if out.dim() == 2:
            out.zero_()
        if len(pairs.token) == 0:
            return
        _grad_values[(len(pairs.token),)](
            out, grad.contiguous(), pairs.token, pairs.feature, weight, *_rows(layout, out.device),
            L=layers, F=layout.n_features, D=d_model, PER_TARGET=out.dim() == 2, WIDTH=_width(d_model),
            WIDE=_wide(weight),
        )  # fmt: skip

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]; see `Kernels`."""
        _, layers, d_model = dense.shape
        bases, steps, use_start, sources, targets = _blocks(layout, out.device)
        if overwrite and len(bases) * layout.n_features < layout.rows:
            out.zero_()  # some rows belong to no feature
        width = _width(d_model)
        _grad_rows[(len(bases) * layout.n_features, -(-d_model // width))](
            out, values.contiguous(), pairs.token, pairs.by_feature, pairs.feature_start, dense.contiguous(),
            bases, steps, use_start, sources, targets,
            L=layers, F=layout.n_features, D=d_model, PER_TARGET=values.dim() == 2, OVERWRITE=overwrite,
            WIDTH=width, WIDE=_wide(out),
        )  # fmt: skip


@lru_cache(maxsize=64)
def _rows(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """The layout's numbers [L]. Cached on the device: to copy them in each call would wait for the device."""
    return tuple(torch.tensor(x, device=device) for x in (layout.first, layout.step, layout.stride, layout.count))


@lru_cache(maxsize=64)
def _blocks(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """Which source layers use which rows for which targets.

    Block k is the rows bases[k] + f * steps[k] of all features f. It is used by the source layers
    sources[use_start[k] : use_start[k + 1]] for the target layers targets[use_start[k] : use_start[k + 1]].
    """
    users: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for s in range(layout.n_layers):
        for j in range(layout.count[s]):
            users.setdefault((layout.first[s] + j * layout.stride[s], layout.step[s]), []).append((s, s + j))
    start = [0]
    for uses in users.values():
        start.append(start[-1] + len(uses))
    flat = [use for uses in users.values() for use in uses]
    columns = (*zip(*users, strict=True), start, *zip(*flat, strict=True))
    return tuple(torch.tensor(column, device=device) for column in columns)


def _width(d_model: int) -> int:
    return min(WIDEST, triton.next_power_of_2(d_model))


def _wide(weight: Tensor) -> Any:
    """The type to sum in."""
    return tl.float64 if weight.dtype == torch.float64 else tl.float32
