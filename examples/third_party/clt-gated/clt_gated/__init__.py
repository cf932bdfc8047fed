"""The activation `gated`: separate parameters say whether a feature is active, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Activation, Context


@frozen(kw_only=True)
class GatedConfig:
    """1[pre > 0] · relu(exp(r) · pre + c), with r and c learned per feature (Rajamanoharan et al. 2024,
    arXiv 2404.16014, section 3.2, where gate and magnitude share the encoder's direction)."""

    offset: float = field(default=0.0, validator=validators.ge(0))
    """First value of c: the value of a feature whose gate has just opened, in units of pre-activations."""


def build(config: GatedConfig, context: Context) -> Activation:
    from clt_gated.gated import Gated

    return Gated(config.offset, context)


@hookimpl
def clt_activations() -> list[Spec]:
    return [Spec("gated", GatedConfig, build)]
