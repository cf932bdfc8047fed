"""Terms of the training loss: mse, tanh_sparsity, preactivation, auxk, kl, ce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import Selected, Spec, default_choice, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class MSEConfig:
    """Squared error of the reconstruction: the sum over layers of the mean over tokens and dimensions."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the term."""
    scale: Literal["variance", "raw"] = "variance"
    """"variance" divides each layer's error by the variance of its targets, which gives the NMSE; "raw" does not."""


@frozen(kw_only=True)
class TanhSparsityConfig:
    """λ · mean over tokens of Σ tanh(c · decoder norm · activation) (Lindsey et al. 2025, "Circuit Tracing")."""

    weight: float = field(default=1e-3, validator=validators.ge(0))
    """λ at its highest."""
    c: float = field(default=1.0, validator=validators.gt(0))
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
    """Multiplies a term that pulls the mean pre-activation of these features up."""
    weight_schedule: Annotated[Selected, "schedule"] | None = None
    """Both weights over the run; constant if not given."""


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


def build_mse(config: MSEConfig, context: Context) -> Any:
    from clt_losses.terms import MSE

    return MSE(config)


def build_tanh_sparsity(config: TanhSparsityConfig, context: Context) -> Any:
    from clt_losses.terms import TanhSparsity

    return TanhSparsity(config, context)


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
        Spec("preactivation", PreactivationConfig, build_preactivation),
        Spec("auxk", AuxKConfig, build_auxk),
        Spec("kl", KLConfig, build_kl),
        Spec("ce", CEConfig, build_ce),
    ]
