"""The optimizer `lion`: steps by the sign of a momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class LionConfig:
    """Lion (Chen et al. 2023, arXiv 2302.06675): w <- w - lr * (sign(beta1 * m + (1 - beta1) * g) + decay * w)."""

    beta1: float = field(default=0.9, validator=[validators.ge(0), validators.lt(1)], metadata=FREE_ON_RESUME)
    """How much of the momentum m is in the direction of a step; the rest is the gradient g."""
    beta2: float = field(default=0.99, validator=[validators.ge(0), validators.lt(1)], metadata=FREE_ON_RESUME)
    """The decay of the momentum: m <- beta2 * m + (1 - beta2) * g, after the step."""
    weight_decay: float = field(default=0.0, validator=validators.ge(0), metadata=FREE_ON_RESUME)
    """Of matrices alone, decoupled from the gradient."""


def build(config: LionConfig, context: Context) -> Any:
    from clt_training_ideas.lion_step import LionMaker

    return LionMaker(config)


@hookimpl
def clt_optimizers() -> list[Spec]:
    return [Spec("lion", LionConfig, build)]
