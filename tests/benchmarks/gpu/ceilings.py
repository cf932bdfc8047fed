"""What this GPU reaches at best: the speed of a copy, and of matrix products by type."""

from __future__ import annotations

from typing import Any

import torch

from tests.benchmarks.gpu.timing import milliseconds


def ceilings(device: torch.device, *, small: bool = False) -> dict[str, Any]:
    """Bytes per second of a copy (read and written together), and operations per second of products [n, n] · [n, n].

    Args:
        small: sizes for a CPU, to try the benchmark itself.
    """
    size, n = (2**20, 256) if small else (2**30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    out: dict[str, Any] = {"copy_bytes_per_s": 2 * size / (1e-3 * milliseconds(lambda: target.copy_(source), device))}
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, False),
            ("tf32", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            # Random numbers: a product of zeros draws less power and runs faster.
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            product = torch.empty_like(a)
            spent = milliseconds(lambda a=a, b=b, out=product: torch.mm(a, b, out=out), device)
            out[f"{name}_flops_per_s"] = 2 * n**3 / (1e-3 * spent)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return out
