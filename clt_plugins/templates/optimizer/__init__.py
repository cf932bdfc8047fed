"""The optimizer `example`: steps by the sign of a momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Lion (Chen et al. 2023, arXiv 2302.06675): every number moves by the rate, in the direction of a momentum."""

    beta: float = field(default=0.9, validator=[validators.ge(0), validators.lt(1)], metadata=FREE_ON_RESUME)
    """How much of the momentum is in the direction of a step."""
    momentum: float = field(default=0.99, validator=[validators.ge(0), validators.lt(1)], metadata=FREE_ON_RESUME)
    """The decay of the momentum."""
    weight_decay: float = field(default=0.0, validator=validators.ge(0), metadata=FREE_ON_RESUME)
    """Of matrices, decoupled."""


def build(config: ExampleConfig, context: Context) -> Any:
    from clt_plugins.templates.optimizer.optimizer import Example

    return Example(config)


@hookimpl
def clt_optimizers() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
