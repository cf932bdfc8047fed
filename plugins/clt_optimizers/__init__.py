"""Optimizers: adam, adamw, rowwise_adam, muon, adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import Attribute, field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe

ROLES = ("encoder", "decoder", "bias", "threshold", "loss", "other")
not_negative: Any = validators.ge(0)
decays: Any = [
    validators.min_len(2),
    validators.max_len(2),
    validators.deep_iterable(validators.and_(not_negative, validators.lt(1))),
]


def _known_roles(_: Any, attribute: Attribute[Any], value: dict[str, Any]) -> None:
    if unknown := set(value) - set(ROLES):
        raise ValueError(f"'{attribute.name}' must name some of {', '.join(ROLES)}: {', '.join(sorted(unknown))}")


@frozen(kw_only=True)
class RoleConfig:
    """Rates of the weights with one role."""

    lr_factor: float = field(default=1.0, validator=not_negative)
    """Multiplies the learning rate, and what a plugin multiplies it by for a weight (`jumprelu` for thresholds)."""
    weight_decay: float | None = field(default=None, validator=validators.optional(not_negative))
    """Their weight decay; of the others, `weight_decay` of matrices and 0 of all else."""


@frozen(kw_only=True)
class RatesConfig:
    """What all of these optimizers have."""

    weight_decay: float = field(default=0.0, validator=not_negative, metadata=FREE_ON_RESUME)
    """Of the encoder's and decoder's matrices."""
    roles: dict[str, RoleConfig] = field(factory=dict, validator=_known_roles, metadata=FREE_ON_RESUME)
    """Learning-rate factor and weight decay by role: `encoder` and `decoder` (matrices), `bias`, `threshold` (of the
    activation), `loss` (of losses), `other`."""


@frozen(kw_only=True)
class AdamConfig(RatesConfig):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980): torch's fused one, or one that rounds at random where weights or
    moments are bfloat16."""

    betas: list[float] = field(factory=lambda: [0.9, 0.95], validator=decays, metadata=FREE_ON_RESUME)
    """The decay of the first and second moment."""
    eps: float = field(default=1e-8, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """Added to the root of the second moment."""
    states: Literal["fp32", "bf16"] = "fp32"
    """The type of the moments."""
    bf16_weights: Literal["stochastic", "split"] | None = None
    """How bfloat16 weights (`transcoder.dtype`) keep updates that are smaller than their last place: they are rounded
    up or down at random, in proportion (`stochastic`, the default for them); or each is the upper half of a float32,
    whose lower half takes 2 bytes more (`split`)."""


@frozen(kw_only=True)
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""


@frozen(kw_only=True)
class RowwiseAdamConfig(RatesConfig):
    """Adam with one second moment for each row of a matrix, the mean over its d_model numbers: half the memory of
    Adam's moments (after Adam-mini, Zhang et al. 2024, arXiv 2406.16793, with rows as blocks). Weight decay is
    decoupled."""

    betas: list[float] = field(factory=lambda: [0.9, 0.95], validator=decays, metadata=FREE_ON_RESUME)
    """The decay of the first and second moment."""
    eps: float = field(default=1e-8, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """Added to the root of the second moment."""


@frozen(kw_only=True)
class MuonConfig(RatesConfig):
    """torch's Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrix of each layer of encoder and
    decoder, AdamW for all else. Weight decay is decoupled. Not with features split over ranks."""

    momentum: float = field(default=0.95, validator=[not_negative, validators.lt(1)], metadata=FREE_ON_RESUME)
    """The decay of the matrices' momentum."""
    nesterov: bool = True
    """Whether the gradient is added to the momentum once more."""
    newton_schulz_steps: int = field(default=5, validator=[validators.gt(0), validators.lt(100)])
    """Iterations of the orthogonalisation, which runs in bfloat16."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What the rate of an A × B matrix is multiplied by: 0.2 · sqrt(max(A, B)), so that one rate suits Adam too (Liu et
    al. 2025, arXiv 2502.16982); or sqrt(max(1, A / B))."""
    betas: list[float] = field(factory=lambda: [0.9, 0.95], validator=decays, metadata=FREE_ON_RESUME)
    """Adam's, for all else."""
    eps: float = field(default=1e-8, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """Adam's, for all else."""


@frozen(kw_only=True)
class AdafactorConfig(RatesConfig):
    """torch's Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): second moments as products of a row and a column, no
    first moment. The step of a parameter is the rate times its root mean square: `train.lr` is some ten times Adam's.
    A rate above 1 / sqrt(step) is cut to that by torch; `optim/lr` is logged without the cut. On a GPU it reads numbers
    back in every step. Not with features split over ranks."""

    beta2_decay: float = field(default=-0.8, validator=validators.le(0), metadata=FREE_ON_RESUME)
    """The second moment's decay in step t is 1 - t to this power."""
    eps: float = field(default=1e-3, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """The smallest root mean square that a parameter counts as having."""
    clip: float = field(default=1.0, validator=validators.ge(1), metadata=FREE_ON_RESUME)
    """The largest root mean square of an update, before the rate."""


def build_adam(config: AdamConfig, context: Context) -> Any:
    from clt_optimizers.adam import MakesAdam

    return MakesAdam(config, context)


def build_rowwise_adam(config: RowwiseAdamConfig, context: Context) -> Any:
    from clt_optimizers.rowwise import MakesRowwiseAdam

    return MakesRowwiseAdam(config, context)


def build_muon(config: MuonConfig, context: Context) -> Any:
    from clt_optimizers.muon import MakesMuon

    return MakesMuon(config, context)


def build_adafactor(config: AdafactorConfig, context: Context) -> Any:
    from clt_optimizers.adafactor import MakesAdafactor

    return MakesAdafactor(config, context)


@hookimpl
def clt_optimizers() -> list[Spec]:
    return [
        Spec("adam", AdamConfig, build_adam),
        Spec("adamw", AdamWConfig, build_adam),
        Spec("rowwise_adam", RowwiseAdamConfig, build_rowwise_adam),
        Spec("muon", MuonConfig, build_muon),
        Spec("adafactor", AdafactorConfig, build_adafactor),
    ]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    config, dtype = recipe.optimizer.config, recipe.transcoder.dtype
    if isinstance(config, AdamConfig):
        if config.bf16_weights is not None and dtype != "bfloat16":
            remedy = 'leave it out, or set transcoder.dtype = "bfloat16"'
            return [f"optimizer.bf16_weights: weights are {dtype}: {remedy}"]
    elif isinstance(config, RatesConfig) and dtype == "bfloat16":
        remedy = 'set transcoder.dtype = "float32", or optimizer = "adam"'
        return [f"optimizer.name: {recipe.optimizer.name} would lose small updates of bfloat16 weights: {remedy}"]
    return []
