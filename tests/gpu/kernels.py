"""What each Triton kernel has to do, from what it is launched with and how pairs fall on features.

Instructions are those of the loops that `ptxas` made for sm_90; `test_compiled` holds them.
"""

from __future__ import annotations

import math
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


def _adam(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    weight, grad, mean = given["weight"], given["grad"], given["mean"]
    moved = 2 * (weight.bytes + 2 * mean.bytes) + (2 * given["low"].bytes if given["SPLIT"] else 0)
    # A row that no pair of the step touches has no gradient to be read.
    used = 1.0
    if given["USED"]:
        untied = math.prod(given["squares"].shape) != load.n_layers * load.n_features
        used = load.rows(untied) / max(1.0, float((load.targets if untied else load.targets * 0 + 1).sum()))
    return Work(moved + used * grad.bytes, instructions=ADAM * launch.grid[0])


ADAM = 456
"""Of a warp for 256 numbers."""

KERNELS: dict[str, Callable[[Launch, Load], Work]] = {"adam": _adam}
