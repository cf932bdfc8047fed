"""The values of metrics: numbers, or CPU tensors [L] (one value per layer) and [L, F] (a histogram per layer)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def dimensions(value: Any) -> int:
    """0 for a number, 1 for a value per layer, 2 for a histogram's values."""
    return value.ndim if isinstance(value, Tensor) else 0


def plain(value: Any) -> Any:
    """A Python number, or a list of them."""
    return value.tolist() if isinstance(value, Tensor | np.generic) else value
