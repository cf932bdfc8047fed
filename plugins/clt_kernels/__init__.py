"""Sparse products: torch (any device), numba (CPU), triton (CUDA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class TorchConfig:
    """PyTorch's own operations, on any device: the reference."""


@frozen(kw_only=True)
class NumbaConfig:
    """Compiled for the CPU by Numba. The first use on a machine compiles for some seconds."""


@frozen(kw_only=True)
class TritonConfig:
    """Compiled for CUDA GPUs by Triton. Tested under Triton's interpreter, not yet run on a GPU."""

    gradients_from: Literal["float32", "bfloat16"] = "float32"
    """The type in which gradients of bfloat16 weights read the gradient of the reconstruction and the encoder's inputs.
    bfloat16 halves the largest part of what they read, and rounds as storing the gradient in bfloat16 does."""


def build_torch(config: TorchConfig, context: Context) -> Any:
    from clt_kernels.reference import TorchKernels

    return TorchKernels(fixed=context.device.type != "cpu")


def build_numba(config: NumbaConfig, context: Context) -> Any:
    if context.device.type != "cpu":
        raise Refused("kernels", f'"numba" runs on the CPU only, not on {context.device}: use "auto" or "torch"')
    from clt_kernels.cpu.kernels import NumbaKernels

    return NumbaKernels()


def build_triton(config: TritonConfig, context: Context) -> Any:
    import os

    if context.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Refused("kernels", f'"triton" runs on CUDA GPUs only, not on {context.device}: use "auto" or "torch"')
    try:
        from clt_kernels.gpu.kernels import TritonKernels
    except ModuleNotFoundError as error:
        raise Refused("kernels", f'"triton" cannot be imported ({error}): install it, or use "torch"') from error
    return TritonKernels(narrow=config.gradients_from == "bfloat16")


@hookimpl
def clt_kernels() -> list[Spec]:
    return [
        Spec("torch", TorchConfig, build_torch),
        Spec("numba", NumbaConfig, build_numba),
        Spec("triton", TritonConfig, build_triton),
    ]
