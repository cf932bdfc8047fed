"""The activation source `synthetic`: sparse features that are known exactly, for tests and demonstrations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe


@frozen(kw_only=True)
class SyntheticConfig:
    """Activations that are sums of sparse random features. Each feature is in the inputs of one layer, and in the
    targets of that layer and all later ones."""

    layers: int = field(default=4, validator=validators.gt(0))
    """L: the number of layers."""
    d_model: int = field(default=32, validator=validators.gt(0))
    """D: the width of inputs and targets."""
    features: int = field(default=64, validator=validators.gt(0))
    """True features of each layer. If there are more than `d_model`, they are in superposition."""
    active: float = field(default=4.0, validator=validators.gt(0))
    """How many features are active at a token, on average, over all layers."""
    noise: float = field(default=0.0, validator=validators.ge(0))
    """Standard deviation of the noise that is added to every input and target."""


def build_synthetic(config: SyntheticConfig, context: Context) -> Any:
    from clt_synthetic.source import Synthetic

    return Synthetic(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("synthetic", SyntheticConfig, build_synthetic)]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    config = recipe.source.config
    if not isinstance(config, SyntheticConfig) or config.active <= config.layers * config.features:
        return []
    return [
        f"source.active: {config.active:g} features cannot be active: all layers have {config.layers * config.features}"
    ]
