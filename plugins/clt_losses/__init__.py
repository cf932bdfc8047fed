"""Terms of the training loss: mse, tanh_sparsity, l0, preactivation, auxk, matryoshka, hierarchical, depth, kl,
ce."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import Attribute, field, frozen, validators

from clt_plugins import Selected, Spec, default_choice, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe


@frozen(kw_only=True)
class MSEConfig:
    """Squared error of the reconstruction: the sum over layers of the mean over tokens and dimensions."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the term."""
    scale: Literal["variance", "raw"] = "variance"
    """"variance" divides each layer's error by the variance of its targets, which gives the NMSE; "raw" does not."""


@frozen(kw_only=True)
class TanhSparsityConfig:
    """λ · mean over tokens of Σ tanh(c · decoder norm · activation) (Ameisen et al. 2025, "Circuit Tracing")."""

    weight: float | None = field(default=None, validator=validators.optional(validators.ge(0)))
    """λ at its highest; 1e-3 if not given. With `activation.target_l0` it is where the search for λ begins: L / (10 ·
    target) if not given."""
    c: float = field(default=4.0, validator=validators.gt(0))
    """How fast the penalty saturates."""
    weight_schedule: Annotated[Selected, "schedule"] = default_choice("ramp")
    """λ over the run; `weight` is its highest value. "ramp" rises linearly from 0, if wanted after a `delay`."""


@frozen(kw_only=True)
class PreactivationConfig:
    """Mean of relu(-pre) over tokens and features: pulls pre-activations up. It keeps all of them in memory."""

    weight: float = field(default=3e-6, validator=validators.ge(0))
    """Multiplies the term."""
    weight_schedule: Annotated[Selected, "schedule"] | None = None
    """The weight over the run; constant if not given."""
    scope: Literal["dead", "all"] = "dead"
    """"dead": only features that were not active for train.dead_after_tokens tokens; "all": every feature, as in the
    reference library."""


@frozen(kw_only=True)
class AuxKConfig:
    """Dead features reconstruct the residual of the others (Gao et al. 2024, arXiv 2406.04093, appendix A.2)."""

    weight: float = field(default=1 / 32, validator=validators.ge(0))
    """Multiplies the term."""
    k: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Dead features used per token, over all layers; half of d_model if not given."""
    pull: float = field(default=0.1, validator=validators.ge(0))
    """Multiplies a term that pulls the pre-activations of these features up: their sum over tokens * k."""
    weight_schedule: Annotated[Selected, "schedule"] | None = None
    """Both weights over the run; constant if not given."""


def _shares(_: Any, attribute: Attribute[Any], value: list[float]) -> None:
    if not value or value[0] <= 0 or value[-1] >= 1 or any(a >= b for a, b in pairwise(value)):
        raise ValueError(f"'{attribute.name}' must be at least one number between 0 and 1, ascending: {value}")


@frozen(kw_only=True)
class L0Config:
    """A penalty on the number of active features: λ L0 (Rajamanoharan et al. 2024, arXiv 2407.14435), or with a target
    λ (L0 / target - 1)², as for Gemma Scope 2. It trains thresholds, so the activation must have some to learn."""

    weight: float | None = field(default=None, validator=validators.optional(validators.ge(0)))
    """λ at its highest. If not given: 1 with a `target`; else 1e-3, but with `activation.target_l0`, where it is what
    the search for λ begins with, L / (10 · target)."""
    target: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """The L0 to reach, a sum over layers, by this quadratic penalty; its weight is not steered. Thresholds must be far
    on the way to it: give `activation.target_l0` instead where you can."""
    frequency_weight: float = field(default=0.0, validator=validators.ge(0))
    """Multiplies a second term, the sum over features of relu(frequency / frequency_above - 1)². It keeps features from
    being active at most tokens. (The form of Gemma Scope 2's is not published; this one is ours.)"""
    frequency_above: float = field(default=0.1, validator=[validators.gt(0), validators.lt(1)])
    """The share of a batch's tokens up to which a feature costs nothing more."""
    weight_schedule: Annotated[Selected, "schedule"] | None = None
    """Both weights over the run; constant if not given."""


@frozen(kw_only=True)
class MatryoshkaConfig:
    """The first features of each layer must also reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547)."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the mean over prefixes of the error that `mse` has for all features."""
    prefixes: list[float] = field(factory=lambda: [0.125, 0.25, 0.5], validator=_shares)
    """The size of each prefix, as a share of a layer's features."""


@frozen(kw_only=True)
class HierarchicalConfig:
    """The highest values must also reconstruct alone: one transcoder is then good at several k (arXiv 2505.24473)."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the mean over shares of the error that `mse` has for all features."""
    shares: list[float] = field(factory=lambda: [0.125, 0.25, 0.5], validator=_shares)
    """How many of the active features each part has."""
    per: Literal["batch", "token"] = "batch"
    """Whether the highest are those of the batch (for `batchtopk`) or of each token (for `topk`)."""


@frozen(kw_only=True)
class DepthConfig:
    """A penalty on what features write to later layers than their own: λ · mean over tokens of the sum over active
    features of Σ over t > s of (t - s)^power · ‖what it writes to layer t‖. The sum of norms is that of crosscoders
    (Lindsey et al. 2024, "Sparse Crosscoders"); to count later layers alone is ours."""

    weight: float = field(default=1e-3, validator=validators.ge(0))
    """λ at its highest."""
    power: float = field(default=0.0, validator=validators.ge(0))
    """How the price grows with the distance: with 0 all later layers cost the same, with 1 twice as far costs twice."""
    draws: int = field(default=1, validator=validators.gt(0))
    """Active features that each token draws in a step; the term estimates the sum over all of them without bias. More
    draws vary less, and each costs a decoding of one feature per token."""
    weight_schedule: Annotated[Selected, "schedule"] | None = None
    """λ over the run; constant if not given."""


@frozen(kw_only=True)
class InModelConfig:
    """A loss of the language model with the transcoder in the place of its MLPs."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the term."""
    contexts: int = field(default=4, validator=validators.gt(0))
    """Contexts of training text that the model reads in a step, of all data ranks together."""
    every: int = field(default=1, validator=validators.gt(0))
    """Steps from one such step to the next. The weight is not multiplied by it."""
    start: float = field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    """The share of the run without it: with 0.9 it acts in the last tenth."""


@frozen(kw_only=True)
class KLConfig(InModelConfig):
    """KL(unchanged model || model with the transcoder in the place of its MLPs), nats per token (arXiv 2503.17272)."""


@frozen(kw_only=True)
class CEConfig(InModelConfig):
    """The cross-entropy of the next token in the model with the transcoder in the place of its MLPs, nats per token."""


UNSTEERED = 1e-3
"""The weight of a penalty on active features that is not given, where L0 has no target."""


def penalty_weight(given: float | None, context: Context) -> float:
    """The weight of a penalty on active features.

    With T features active, the NMSE of each of L layers falls by about NMSE / (2 T) for one more, as it goes with the
    root of T. So what one is worth, with an NMSE of 0.2 and the loss a sum over layers, is L / (10 T). From there the
    weight is steered.
    """
    if given is not None:
        return given
    chosen = None if context.recipe is None else context.recipe.activation.config
    target = getattr(chosen, "target_l0", None)
    return UNSTEERED if target is None else context.n_layers / (10 * target)


def build_mse(config: MSEConfig, context: Context) -> Any:
    from clt_losses.terms import MSE

    return MSE(config)


def build_tanh_sparsity(config: TanhSparsityConfig, context: Context) -> Any:
    from clt_losses.terms import TanhSparsity

    return TanhSparsity(config, context)


def build_l0(config: L0Config, context: Context) -> Any:
    from clt_losses.counted import L0

    return L0(config, context)


def build_matryoshka(config: MatryoshkaConfig, context: Context) -> Any:
    from clt_losses.nested import Matryoshka

    return Matryoshka(config, context)


def build_hierarchical(config: HierarchicalConfig, context: Context) -> Any:
    from clt_losses.nested import Hierarchical

    return Hierarchical(config, context)


def build_depth(config: DepthConfig, context: Context) -> Any:
    from clt_losses.depth import Depth

    return Depth(config, context)


def build_preactivation(config: PreactivationConfig, context: Context) -> Any:
    from clt_losses.terms import Preactivation

    return Preactivation(config, context)


def build_auxk(config: AuxKConfig, context: Context) -> Any:
    from clt_losses.auxk import AuxK

    return AuxK(config, context)


def build_kl(config: KLConfig, context: Context) -> Any:
    from clt_losses.in_model import KL

    return KL(config)


def build_ce(config: CEConfig, context: Context) -> Any:
    from clt_losses.in_model import CE

    return CE(config)


@hookimpl
def clt_losses() -> list[Spec]:
    return [
        Spec("mse", MSEConfig, build_mse),
        Spec("tanh_sparsity", TanhSparsityConfig, build_tanh_sparsity),
        Spec("l0", L0Config, build_l0),
        Spec("matryoshka", MatryoshkaConfig, build_matryoshka),
        Spec("hierarchical", HierarchicalConfig, build_hierarchical),
        Spec("depth", DepthConfig, build_depth),
        Spec("preactivation", PreactivationConfig, build_preactivation),
        Spec("auxk", AuxKConfig, build_auxk),
        Spec("kl", KLConfig, build_kl),
        Spec("ce", CEConfig, build_ce),
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """A penalty on counts trains nothing where k says how many features are active; one on later layers nothing where
    no feature writes to them."""
    fixed = hasattr(recipe.activation.config, "k") or recipe.activation.name == "relu"
    name = recipe.activation.name
    faults = [
        f"losses[{index}]: depth penalises writes to later layers, and {recipe.tying.name!r} has none: leave it out"
        for index, loss in enumerate(recipe.losses)
        if isinstance(loss.config, DepthConfig) and recipe.tying.name == "per_layer"
    ]
    return faults + [
        f"losses[{index}]: l0 trains thresholds, and {name!r} learns none: choose an activation such as jumprelu"
        for index, loss in enumerate(recipe.losses)
        if isinstance(loss.config, L0Config) and fixed
    ]
