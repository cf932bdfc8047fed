"""What each Triton kernel has to do, from what it is launched with and how pairs fall on features.

Instructions are those of the loops that `ptxas` made for sm_90; `test_compiled` holds them.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tests.gpu.count import Launch, Place
from tests.gpu.load import Load


@attrs.frozen
class Work:
    """What a launch needs of the GPU."""

    bytes: float = 0
    """Of its memory, read and written."""
    cached: float = 0
    """Read from the level-2 cache."""
    instructions: float = 0
    """Of a warp."""


def work_of(launch: Launch, load: Load) -> tuple[Work, bool]:
    """What a launch has to do, and whether that is known; if not, it is taken to touch each tensor once."""
    model = KERNELS.get(launch.kernel)
    if model is not None:
        return model(launch, load), True
    return Work(sum(x.bytes for x in launch.arguments.values() if isinstance(x, Place))), False


KERNELS: dict[str, Callable[[Launch, Load], Work]] = {}
