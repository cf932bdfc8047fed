"""Matrix products of numbers of different types: the encoder's, and those of the dense path.

The encoder's product only chooses pairs, unless it is as precise as the weights: their values are computed again. So it
may run in TF32, bfloat16 or 8 bits. Where torch can (on CUDA, from version 2.8 on), its results are float32 all the
same: rounded to bfloat16, pre-activations tie, and of a tie the first layers win.

Shapes: B tokens, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from clt_plugins.errors import Refused

Product = Literal["fp32", "tf32", "bf16", "fp8"]

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What torch's compiler calls for a linear layer on a CPU; torch in eager mode calls it for bfloat16 only. A private
operator: where a version of torch lacks it, `addmm` is used."""

FLOAT8 = torch.float8_e4m3fn
"""Three bits of mantissa; up to 448."""


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in the type of `a`, [M, N]; no gradient.

    Where `b` is bfloat16, a GPU multiplies bfloat16 numbers and sums in float32; a CPU widens `b`.

    Args:
        a: [M, K], in float32 at least; b: [K, N].
    """
    if a.dtype == b.dtype:
        return a @ b
    if _sums_wide(a.dtype, b.dtype, a.device):
        return torch.mm(a.to(b.dtype), b, out_dtype=a.dtype)
    return a @ b.to(a.dtype)


def affine(x: Tensor, weight: Tensor, bias: Tensor, product: Product | None = None) -> Tensor:
    """x · weightᵀ + bias, [B, F]; no gradient. On a CPU by oneDNN, twice as fast as MKL where the CPU is not Intel's.

    Args:
        x: [B, D], in float32 at least; weight: [F, D]; bias: [F].
        product: the type to multiply in, that of the weights if None.
    """
    apart = without_bias(x, weight, product)
    if apart is not None:
        return apart.add_(bias)
    narrow = _narrow(weight, product)
    if narrow != x.dtype:
        a, b = x.to(narrow), weight.to(narrow).T
        return torch.addmm(bias, a, b) if bias.dtype == narrow else a @ b + bias
    if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN is not None:
        return ONEDNN(x, weight, bias, "none", [], "")
    with _tf32(product == "tf32"):
        return torch.addmm(bias, x, weight.T)


def without_bias(x: Tensor, weight: Tensor, product: Product | None = None) -> Tensor | None:
    """x · weightᵀ, [B, F] in float32, where adding a bias would be another pass over the result; None elsewhere.

    Args:
        x: [B, D], in float32 at least; weight: [F, D].
    """
    if product == "fp8":
        (a, scale_a), (b, scale_b) = (_to_float8(t) for t in (x, weight))
        return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.float32)
    narrow = _narrow(weight, product)
    if narrow == x.dtype or not _sums_wide(x.dtype, narrow, x.device):
        return None
    return torch.mm(x.to(narrow), weight.to(narrow).T, out_dtype=x.dtype)


def _narrow(weight: Tensor, product: Product | None) -> torch.dtype:
    return torch.bfloat16 if product == "bf16" else weight.dtype


def is_exact(product: Product | None, weight: Tensor, inputs: Tensor) -> bool:
    """Whether `affine` gives pre-activations as exact as weights and inputs allow."""
    return product in (None, "fp32") and weight.dtype == inputs.dtype


def check_product(product: Product, device: torch.device, *, row_size: int, n_features: int) -> None:
    """Refuse a product that the device does not have.

    Args:
        row_size: H, how many numbers an encoder's row has; d_model for most.
        n_features: F of this rank.

    Raises:
        Refused: says what to choose instead.
    """
    if device.type == "meta":
        return  # nothing is computed there
    if product == "tf32" and (device.type != "cuda" or _capability(device) < (8, 0)):
        raise Refused("train.precision", f'"tf32" needs an NVIDIA GPU of Ampere or later, not {device}: use "fp32"')
    if product == "fp8":
        if row_size % 16 or n_features % 16:
            raise Refused(
                "train.precision",
                f'"fp8" needs sizes divisible by 16: a row of the encoder has {row_size}, '
                f'a rank {n_features} features: use "bf16"',
            )
        if device.type == "cuda" and _capability(device) < (8, 9):
            raise Refused("train.precision", '"fp8" needs an NVIDIA GPU of Ada, Hopper or later: use "bf16"')
        if device.type not in ("cpu", "cuda"):
            raise Refused("train.precision", f'"fp8" is not there on {device}: use "bf16"')


def _to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in 8 bits, and what to multiply them by, a scalar on the device: one scale for all, as large as the
    largest number allows."""
    largest = torch.finfo(FLOAT8).max
    scale = (x.abs().amax().float() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-largest, largest).to(FLOAT8), scale


def _sums_wide(wide: torch.dtype, narrow: torch.dtype, device: torch.device) -> bool:
    """Whether torch can sum products of half-precision numbers into float32 results on this device."""
    half = narrow in (torch.bfloat16, torch.float16)
    return half and wide == torch.float32 and device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype")


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Products of float32 numbers on a GPU with 10 bits of mantissa: several times faster, and nowhere else."""
    if not on:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
