"""Models whose circuits are known: the activation source `planted`, and the stage `recovery`, which says how much of
such a circuit a transcoder has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe

GATES = ("copy", "and", "or", "and_not")

_positive: Any = validators.gt(0)


@frozen(kw_only=True)
class PlantedConfig:
    """Activations of a residual stream in which sparse features compute others, layer after layer, by known gates.

    The model consists of chains. A chain begins with features of the embedding, and each of its hops is an MLP that
    computes a new feature from the one before it.
    """

    layers: int = field(default=3, validator=_positive)
    """L: the number of layers."""
    d_model: int = field(default=64, validator=_positive)
    """D: the width of the residual stream. Directions are orthogonal where all features fit into it, else random."""
    chains: int = field(default=30, validator=_positive)
    """How many chains there are."""
    hops: int = field(default=1, validator=_positive)
    """How many layers, one after the other, compute a feature of a chain: with 2, A -> B -> C."""
    gates: list[Literal["copy", "and", "or", "and_not"]] = field(
        factory=lambda: ["copy"], validator=validators.min_len(1)
    )
    """What hops compute, in turns. All but `copy` also read another feature of the embedding. With any of them values
    are 1; with copies alone they are between 0.5 and 1.5."""
    together: float = field(default=0.7, validator=[validators.gt(0), validators.le(1)])
    """The probability that a feature of the embedding is active where its chain is, if the chain reads several."""
    consume: bool = False
    """Whether a gate that is active removes the features that it reads from the stream. Then later layers can read
    only what it wrote."""
    activity: Literal["independent", "hierarchical", "correlated"] = "independent"
    """Which chains are active together: any; or, in groups, a child only where its parent is; or those of a group
    because they share a Gaussian factor (a Gaussian copula)."""
    group: int = field(default=4, validator=validators.gt(1))
    """Chains in a group: a parent and its children, of which at most one is active; or those that are correlated."""
    correlation: float = field(default=0.6, validator=[validators.gt(0), validators.lt(1)])
    """The correlation of the Gaussian variables of a group, where `activity` is "correlated"."""
    active: float = field(default=3.0, validator=_positive)
    """How many chains are active at a token, on average."""
    norms: float = field(default=1.0, validator=validators.ge(1))
    """The largest norm of a feature's direction over the smallest: norms are log-uniform around 1."""
    noise: float = field(default=0.0, validator=validators.ge(0))
    """Standard deviation of the noise that the embedding and each MLP add to every dimension of the stream."""


@frozen(kw_only=True)
class RecoveryConfig:
    """How much of a planted model a transcoder has: features, edges of chains, absorption, splitting. Only for sources
    that know what is true, such as `planted`."""

    tokens: int = field(default=16384, validator=_positive)
    """Held-out tokens that it is measured on."""
    folder: str = "recovery"
    """The folder of the report; a second such stage in one recipe needs another."""
    every: int | None = field(default=None, validator=validators.optional(_positive), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints."""


def build_planted(config: PlantedConfig, context: Context) -> Any:
    from clt_planted.source import Planted

    return Planted(config, context)


def build_recovery(config: RecoveryConfig, context: Context) -> Any:
    from clt_planted.stage import Recovery

    return Recovery(config)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("planted", PlantedConfig, build_planted)]


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("recovery", RecoveryConfig, build_recovery)]


def rate(config: PlantedConfig) -> float:
    """The probability that a chain is active; of a hierarchical group, that its parent is."""
    if config.activity != "hierarchical":
        return config.active / config.chains
    whole, rest = divmod(config.chains, config.group)
    # A group of n chains has as many active ones as this, where its parent is: it and, of n - 1 children and none, one.
    per_group = [1 + (n - 1) / n for n in [config.group] * whole + [rest] * (rest > 0)]
    return config.active / sum(per_group)


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    faults = []
    for path, selected in recipe.selected():
        config = selected.config
        if not isinstance(config, PlantedConfig):
            continue
        if config.hops > config.layers:
            faults.append(f"{path}.hops: {config.hops} hops need as many layers, and there are {config.layers}")
        if rate(config) > 1:
            most = config.active / rate(config)
            faults.append(f"{path}.active: {config.active:g} chains cannot be active: {most:g} is the most")
    return faults
