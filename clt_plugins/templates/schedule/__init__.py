"""The schedule `example`: a warm-up, then the inverse square root of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Rises linearly to the peak, then falls with the root of the step (Vaswani et al. 2017, arXiv 1706.03762)."""

    warmup: float = field(default=0.1, validator=[validators.gt(0), validators.le(1)])
    """The share of the steps over which it rises."""


class Example:
    """A `Schedule`. It has no state: a resumed run asks for the next step only."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.config = config

    def __call__(self, step: int, steps: int, peak: float) -> float:
        """The number in a step, from 0 to `peak`. Steps beyond `steps` have the last one's."""
        warmup = max(1.0, self.config.warmup * steps)
        done = min(step, steps) + 1
        return peak * min(done / warmup, math.sqrt(warmup / done))


@hookimpl
def clt_schedules() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
