"""The schedule `inverse_sqrt`: a warm-up, then the inverse square root of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class InverseSqrtConfig:
    """peak * min(n / w, sqrt(w / n)) in step n = 1, 2, ..., with w steps of warm-up (Vaswani et al. 2017, arXiv
    1706.03762, equation 3)."""

    warmup_steps: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Steps over which it rises linearly to its peak; a tenth of all if not given."""


class InverseSqrt:
    """A `Schedule`."""

    def __init__(self, config: InverseSqrtConfig, context: Context):
        self.warmup_steps = config.warmup_steps

    def __call__(self, step: int, steps: int, peak: float) -> float:
        """The number in a step from 0; beyond `steps` it stays that of the last step."""
        warmup = self.warmup_steps or max(1, steps // 10)
        n = min(step + 1, steps)
        return peak * min(n / warmup, math.sqrt(warmup / n))


@hookimpl
def clt_schedules() -> list[Spec]:
    return [Spec("inverse_sqrt", InverseSqrtConfig, InverseSqrt)]
