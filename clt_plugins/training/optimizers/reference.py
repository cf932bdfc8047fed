"""Adam's update of a parameter by torch's operations, on any device; `AdamUpdate` defines every number of it."""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugins.data.update import AdamUpdate

ON_CPU, ELSEWHERE = 2**20, 2**25
"""Numbers updated at a time: few enough for a CPU's cache; for a GPU many, as each operation is a launch."""
GOLDEN = 0x9E3779B1
NAN = 0x7FC00000
"""The bits of a float32 that is no number, as they are stored: those of a GPU's, 0x7FFFFFFF, become 0 if something is
added to them."""


def update_rows(update: AdamUpdate) -> None:
    """One step of Adam. Besides what kernels take: float64 weights (without `low`), computed in float64."""
    rows, columns = update.weight.shape
    size = ON_CPU if update.weight.device.type == "cpu" else ELSEWHERE
    step_key = _mix(_step_key(update))
    # Pieces of whole rows, or of one: elements are numbered one after the other within a row.
    height, width = max(1, size // columns), min(size, columns)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            _update(update, slice(row, row + height), slice(column, column + width), step_key)


def _update(update: AdamUpdate, rows: slice, columns: slice, step_key: Tensor) -> None:
    kept, grad, mean_kept, square_kept = (
        x[rows, columns] for x in (update.weight, update.grad, update.mean, update.square)
    )
    low = None if update.low is None else update.low[rows, columns]
    # Without operations that round once for two (addcmul): compiled kernels have the same bits then.
    grad_factor, rate, root_factor, decay, _ = update.scalars
    wide = torch.promote_types(kept.dtype, torch.float32)
    weight = joined(kept, low) if low is not None else kept.to(wide)
    grad = grad.to(wide) * grad_factor
    if update.weight_decay:
        grad += update.weight_decay * weight
    mean = mean_kept.to(wide)
    mean += (grad - mean) * (1 - update.beta1)
    square = square_kept.to(wide) * update.beta2
    square += (1 - update.beta2) * grad * grad
    weight = weight - decay * weight
    weight -= rate * mean / (square.sqrt() * root_factor + update.eps)
    if low is not None:
        halve(weight, kept, low)
    bits = None
    if torch.bfloat16 in (kept.dtype if low is None else None, mean_kept.dtype):
        bits = _bits(update, rows, columns, step_key)
    if low is None:
        store(weight, kept, bits)
    store(mean, mean_kept, None if bits is None else bits >> 16)
    store(square, square_kept, None if bits is None else (bits * _signed(GOLDEN)) >> 16)


def store(x: Tensor, out: Tensor, bits: Tensor | None) -> None:
    """Write numbers; float32 as bfloat16 to one of the two neighbours, the nearer one more often.

    Args:
        bits: the low 16 of these int32 decide.
    """
    if out.dtype == torch.bfloat16:
        assert bits is not None
        # Adding up to one unit in the last kept place, then cutting: the carry goes up with the right probability.
        raised = (x.float().contiguous().view(torch.int32) + (bits & 0xFFFF)) & -(2**16)
        x = raised.masked_fill_(x.isnan(), NAN).view(torch.float32)
    out.copy_(x)


def joined(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of which `weight` (bfloat16) and `low` (int16) are the halves."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


def halve(x: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write float32 numbers as halves: the nearest bfloat16, and what is missing to the float32's bits."""
    bits = x.contiguous().view(torch.int32).masked_fill(x.isnan(), NAN)
    high = (bits + 0x8000) >> 16
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    low.copy_((bits - (high << 16)).to(torch.int16))


def _step_key(update: AdamUpdate) -> Tensor:
    # In int64, where nothing overflows; cut to 32 bits.
    product = update.scalars[4].to(torch.int64) * GOLDEN + update.key
    return product.to(torch.int32)


def _bits(update: AdamUpdate, rows: slice, columns: slice, step_key: Tensor) -> Tensor:
    """32 random bits of each element, int32."""
    stop = min(rows.stop, update.weight.shape[0]), min(columns.stop, update.weight.shape[1])
    device = update.weight.device
    row = torch.arange(rows.start, stop[0], device=device)
    first = row // update.period * update.stride + row % update.period * update.weight.shape[1] + update.first
    element = first[:, None] + torch.arange(columns.start, stop[1], device=device)
    high = (element >> 32).to(torch.int32) * _signed(GOLDEN)
    return _mix(element.to(torch.int32) ^ high ^ step_key)


def _mix(x: Tensor) -> Tensor:
    """The last steps of MurmurHash3, on int32."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x85EBCA6B)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _signed(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    """The int32 with the same bits."""
    return x - 2**32 if x >= 2**31 else x
