"""Numbers of a GPU that the host learns without stopping the GPU."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

LATE = 2
"""How many calls later the host learns a GPU's numbers."""


class Late:
    """Integers that a device has computed, known to the host at once on a CPU and `LATE` calls later on a GPU.

    On a GPU the numbers are copied into pinned memory while it goes on. The host takes the copy of exactly `LATE` calls
    ago, so what it decides does not depend on timing. Only a host that is more than a step ahead of its GPU finds that
    copy not there yet. It then waits while the GPU still has a whole step to do, so the GPU never waits.
    """

    def __init__(self) -> None:
        self.copies: deque[tuple[Tensor, Any]] = deque()

    def exchange(self, numbers: Tensor) -> list[int] | None:
        """Hand in numbers [n]; returns those of `LATE` calls ago (of this call on a CPU), None while there are none."""
        if numbers.device.type == "cpu":
            return numbers.tolist()
        if numbers.device.type != "cuda" or not torch.cuda.is_available():
            return None
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copy.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.copies.append((copy, event))
        if len(self.copies) <= LATE:
            return None
        copy, event = self.copies.popleft()
        event.synchronize()
        return copy.tolist()
