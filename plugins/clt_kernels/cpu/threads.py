"""How many threads the compiled loops use: no more than torch, and one where the work is small."""

from __future__ import annotations

import numba
import torch


def use_threads(units: int) -> int:
    """Set the number of threads for the next compiled loops of this Python thread.

    Args:
        units: how many threads have enough to do. On a busy machine a thread that has little to do is waited for until
            the system gives it a core, which takes many times as long as its work: give each about 0.1 ms.

    Returns:
        The number: at least 1, at most `torch.get_num_threads()`.
    """
    before = torch.get_num_threads()
    count = max(1, min(units, before, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(count)
    if torch.get_num_threads() != before:
        # Numba's first call starts its threads in the OpenMP that torch uses too, and sets their number for both. The
        # user's OMP_NUM_THREADS, or torchrun's, must hold.
        torch.set_num_threads(before)
    return count
