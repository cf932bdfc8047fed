"""Memory that a step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: free bytes at the end of the heap that go back to the system; from how many bytes on
a block is mapped by itself, and goes back as soon as it is freed."""
KEPT = 2**30
"""Larger blocks still go back: they are few, and as good as never split."""
USUAL = 2**25
"""What glibc's own adaptation of the two numbers ends at."""


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """While the loop runs on a CPU, glibc keeps the memory of freed tensors, instead of giving it back to the system.

    A step frees all that it made but weights and gradients. The next step would get the same amount as fresh pages,
    each of which the system clears at its first use. At the end unused memory is given back. Other C libraries, and an
    environment that sets these numbers itself, are left alone.
    """
    mallopt = _mallopt() if device.type == "cpu" else None
    if mallopt is None:
        yield
        return
    if not mallopt(MMAP_THRESHOLD, KEPT):
        mallopt(MMAP_THRESHOLD, USUAL)  # older versions take no more
    mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, USUAL)
        mallopt(TRIM_THRESHOLD, 2 * USUAL)
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if set_by_user or not _is_glibc():
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
