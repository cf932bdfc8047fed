"""The loss `uncertainty`: errors of layers, with weights that are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class UncertaintyConfig:
    """The sum over layers of error_l * exp(-s_l) + s_l with s learned (Kendall et al. 2018, arXiv 1705.07115, whose
    log sigma^2 is s); error_l is the mean of the squared error in normalised units. In place of `mse`."""

    start: float = field(default=0.0)
    """The first value of each s_l."""
    weight: float = field(default=1.0, validator=validators.gt(0))
    """Multiplies the term."""


def build(config: UncertaintyConfig, context: Context) -> Any:
    from clt_training_ideas.uncertainty_term import Uncertainty

    return Uncertainty(config, context)


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("uncertainty", UncertaintyConfig, build)]
