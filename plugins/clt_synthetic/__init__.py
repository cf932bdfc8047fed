"""The activation source `synthetic`: sparse features with a known truth, for tests and demonstrations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class SyntheticConfig:
    """Activations made of sparse features, each read at one layer and written to that layer and all later ones."""

    layers: int = field(default=4, validator=validators.gt(0))
    """L."""
    d_model: int = field(default=32, validator=validators.gt(0))
    """D."""
    features: int = field(default=64, validator=validators.gt(0))
    """True features of each layer; more than `d_model` lie in superposition."""
    active: float = field(default=4.0, validator=validators.gt(0))
    """How many features of all layers together are active at a token, on average."""
    noise: float = field(default=0.0, validator=validators.ge(0))
    """Standard deviation of what is added to every input and target."""


def build_synthetic(config: SyntheticConfig, context: Context) -> Any:
    from clt_synthetic.source import Synthetic

    return Synthetic(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("synthetic", SyntheticConfig, build_synthetic)]


@hookimpl
def clt_check(recipe: Any) -> list[str]:
    config = recipe.source.config
    if not isinstance(config, SyntheticConfig) or config.active <= config.layers * config.features:
        return []
    return [f"source.active: {config.active:g} features cannot be active, there are {config.layers * config.features}"]
