"""Schedules: constant, linear, cosine, wsd, ramp."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe, Schedule


@frozen(kw_only=True)
class ConstantConfig:
    """The peak in every step, after the warm-up."""

    warmup_steps: int | None = field(default=None, validator=validators.optional(validators.ge(0)))
    """Steps over which it rises linearly to its peak, from peak / warmup_steps in the first; a tenth of all if not
    given."""

    def warmup(self, steps: int) -> int:
        """How many steps the warm-up has."""
        return steps // 10 if self.warmup_steps is None else self.warmup_steps


@frozen(kw_only=True)
class LinearConfig(ConstantConfig):
    """Falls linearly from the peak, after the warm-up."""

    end: float = field(default=0.1, validator=[validators.ge(0), validators.le(1)])
    """Where it ends, as a share of the peak; a tenth, as in crosslayer-coding, if not given."""


@frozen(kw_only=True)
class CosineConfig(ConstantConfig):
    """Falls like half a cosine wave from the peak, after the warm-up (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    end: float = field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    """Where it ends, as a share of the peak."""


@frozen(kw_only=True)
class WSDConfig(ConstantConfig):
    """Warm-up, then the peak, then a linear decay over the last steps (Hu et al. 2024, arXiv 2404.06395)."""

    decay: float = field(default=0.2, validator=[validators.gt(0), validators.le(1)])
    """The share of all steps over which it falls, the last ones."""
    end: float = field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    """Where it ends, as a share of the peak."""


@frozen(kw_only=True)
class RampConfig:
    """Rises linearly from 0 to the peak, which it would have after the last step. For the weights of losses."""

    delay: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """The share of all steps for which it stays 0 first."""


def after_warmup(config: ConstantConfig, step: int, steps: int) -> float:
    """The share of the steps after the warm-up that are done, 0 to 1."""
    warmup = config.warmup(steps)
    return min(1.0, (step - warmup) / max(1, steps - warmup))


def build_constant(config: ConstantConfig, context: Context) -> Schedule:
    def constant(step: int, steps: int, peak: float) -> float:
        warmup = config.warmup(steps)
        return peak * (step + 1) / warmup if step < warmup else peak

    return constant


def build_linear(config: LinearConfig, context: Context) -> Schedule:
    def linear(step: int, steps: int, peak: float) -> float:
        if step < (warmup := config.warmup(steps)):
            return peak * (step + 1) / warmup
        return peak * (1 - (1 - config.end) * after_warmup(config, step, steps))

    return linear


def build_cosine(config: CosineConfig, context: Context) -> Schedule:
    def cosine(step: int, steps: int, peak: float) -> float:
        if step < (warmup := config.warmup(steps)):
            return peak * (step + 1) / warmup
        left = 0.5 * (1 + math.cos(math.pi * after_warmup(config, step, steps)))
        return peak * (config.end + (1 - config.end) * left)

    return cosine


def build_wsd(config: WSDConfig, context: Context) -> Schedule:
    def wsd(step: int, steps: int, peak: float) -> float:
        if step < (warmup := config.warmup(steps)):
            return peak * (step + 1) / warmup
        left = min(1.0, (1 - min(1.0, step / steps)) / config.decay)
        if warmup > (1 - config.decay) * steps:  # no plateau is left: it falls from the end of the warm-up on
            left = 1 - after_warmup(config, step, steps)
        return peak * (config.end + (1 - config.end) * left)

    return wsd


def build_ramp(config: RampConfig, context: Context) -> Schedule:
    def ramp(step: int, steps: int, peak: float) -> float:
        return peak * min(1.0, max(0.0, (min(1.0, step / steps) - config.delay) / (1 - config.delay)))

    return ramp


@hookimpl
def clt_schedules() -> list[Spec]:
    return [
        Spec("constant", ConstantConfig, build_constant),
        Spec("linear", LinearConfig, build_linear),
        Spec("cosine", CosineConfig, build_cosine),
        Spec("wsd", WSDConfig, build_wsd, aliases=("linear_final20",)),
        Spec("ramp", RampConfig, build_ramp),
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    steps = recipe.train.schedule_steps or recipe.train.steps
    return [
        f"{path}.warmup_steps: must be < steps ({steps}): {chosen.config.warmup_steps}"
        for path, chosen in recipe.selected()
        if isinstance(chosen.config, ConstantConfig) and (chosen.config.warmup_steps or 0) >= steps
    ]
