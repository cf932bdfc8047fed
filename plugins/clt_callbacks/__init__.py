"""What acts between steps: resample, decoder_norm, ema, early_stopping; and initial values: tied_start,
active_subspace, exemplar_start; and at the end: fit_decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe

positive: Any = validators.gt(0)
share: Any = [validators.gt(0), validators.le(1)]


@frozen(kw_only=True)
class ResampleConfig:
    """Begin dead features anew at inputs with a high loss (Bricken et al. 2023, "Towards Monosemanticity")."""

    every: int = field(default=1000, validator=positive)
    """Steps between resamplings."""
    until: float = field(default=0.5, validator=share)
    """The share of the training steps after which there are none: later, new features have no time to learn."""
    tokens: int = field(default=8192, validator=positive)
    """Tokens to draw from. They are read ahead, and trained on as well."""
    encoder_scale: float = field(default=0.2, validator=positive)
    """Norm of a new encoder row, as a share of the mean norm of those of the layer's active features."""


@frozen(kw_only=True)
class DecoderNormConfig:
    """Keep the norm of each feature's decoder, over all layers that it writes to, at a number or below it."""

    norm: float = field(default=1.0, validator=positive)
    """The number."""
    how: Literal["at_most", "exactly"] = "at_most"
    """Whether smaller norms stay as they are."""
    compensate: bool = False
    """Divide the encoder's row and bias, and thresholds, by what the decoder is multiplied by: the reconstruction stays
    the same. With `topk` and `batchtopk` it does so if `ranking = "norm"`, with `groupmax` it does not."""
    every: int = field(default=1, validator=positive)
    """Steps between projections."""


@frozen(kw_only=True)
class EMAConfig:
    """Moving average of the weights, for evaluation and the saved transcoder (Polyak & Juditsky 1992)."""

    decay: float = field(default=0.999, validator=[validators.gt(0), validators.lt(1)])
    """What remains of the average at each update. It begins smaller: n / (n + 9) at update n, counted from 0."""
    every: int = field(default=1, validator=positive)
    """Steps between updates."""


@frozen(kw_only=True)
class EarlyStoppingConfig:
    """End training where held-out tokens no longer get better."""

    metric: str = "eval/nmse"
    """What is watched: a number that the run logs, as loggers call it."""
    better: Literal["lower", "higher"] = "lower"
    """Which way is better."""
    patience: int = field(default=3, validator=positive)
    """Evaluations (every `train.eval_every` steps) without an improvement after which training ends."""
    change: float = field(default=0.0, validator=validators.ge(0))
    """The smallest change that counts as an improvement."""


@frozen(kw_only=True)
class TiedStartConfig:
    """Initial values: encoder rows are decoder rows for the own layer (Gao et al. 2024, arXiv 2406.04093,
    whose encoder starts as the transpose of the decoder)."""

    scale: float = field(default=1.0, validator=positive)
    """Multiplies the rows."""


@frozen(kw_only=True)
class ActiveSubspaceConfig:
    """Initial values: encoder and decoder rows are projected onto the directions in which activations vary
    (Wang et al. 2025, arXiv 2508.16929)."""

    variance: float = field(default=0.99, validator=share)
    """The directions of each layer are the fewest that have this share of the mean square of its activations."""
    dimensions: int | None = field(default=None, validator=validators.optional(positive))
    """So many directions in every layer, instead."""
    tokens: int = field(default=65536, validator=positive)
    """Training tokens that they are estimated from."""
    decoder: bool = True
    """Whether decoder rows are projected too, where each feature has its own."""


@frozen(kw_only=True)
class ExemplarStartConfig:
    """Initial values: each feature is an example. Its encoder row has the direction of a training token's input, its
    decoder rows that token's targets, so that the first reconstruction is a kernel regression (Nadaraya 1964). Training
    starts far lower, and fewer features die."""

    tokens_per_feature: float = field(default=2.0, validator=positive)
    """So many tokens are read for each feature of a layer; every layer draws its examples from them at random."""


@frozen(kw_only=True)
class FitDecoderConfig:
    """At the end of training, the decoder of least squares for the features as they are (Engan, Aase & Husøy 1999).
    The encoder does not change. The run is evaluated once more after it. Where features are ranked by their decoder's
    norm, the fit changes which are active, and less is gained than is logged."""

    tokens: int = field(default=2**18, validator=positive)
    """Training tokens that it is fitted to: the next ones of the source, which may be those of a new epoch. A feature
    should be active at a thousand of them or more; with a few hundred the fit is worse than what training found. What
    is active is kept: 40 bytes for each pair of a token and a feature."""
    iterations: int = field(default=8, validator=positive)
    """Of conjugate gradients. Each costs about a quarter of a training step for each batch of tokens."""
    ridge: float = field(default=0.1, validator=validators.ge(0))
    """How strongly rows are held at those of training: a multiple of the mean, over features, of the sum of squares of
    a feature's values."""


def build_resample(config: ResampleConfig, context: Context) -> Any:
    from clt_callbacks.resample import Resample

    return Resample(config, context)


def build_decoder_norm(config: DecoderNormConfig, context: Context) -> Any:
    from clt_callbacks.norm import DecoderNorm

    return DecoderNorm(config)


def build_ema(config: EMAConfig, context: Context) -> Any:
    from clt_callbacks.average import EMA

    return EMA(config)


def build_early_stopping(config: EarlyStoppingConfig, context: Context) -> Any:
    from clt_callbacks.early import EarlyStopping

    return EarlyStopping(config, context)


def build_tied_start(config: TiedStartConfig, context: Context) -> Any:
    from clt_callbacks.initial import TiedStart

    return TiedStart(config)


def build_active_subspace(config: ActiveSubspaceConfig, context: Context) -> Any:
    from clt_callbacks.initial import ActiveSubspace

    return ActiveSubspace(config)


def build_exemplar_start(config: ExemplarStartConfig, context: Context) -> Any:
    from clt_callbacks.exemplar import ExemplarStart

    return ExemplarStart(config)


def build_fit_decoder(config: FitDecoderConfig, context: Context) -> Any:
    from clt_callbacks.fitted import FitDecoder

    return FitDecoder(config)


@hookimpl
def clt_callbacks() -> list[Spec]:
    return [
        Spec("resample", ResampleConfig, build_resample),
        Spec("decoder_norm", DecoderNormConfig, build_decoder_norm),
        Spec("ema", EMAConfig, build_ema),
        Spec("early_stopping", EarlyStoppingConfig, build_early_stopping),
        Spec("tied_start", TiedStartConfig, build_tied_start),
        Spec("active_subspace", ActiveSubspaceConfig, build_active_subspace),
        Spec("exemplar_start", ExemplarStartConfig, build_exemplar_start),
        Spec("fit_decoder", FitDecoderConfig, build_fit_decoder),
    ]


FIRST_VALUES = {"tied_start", "active_subspace", "exemplar_start"}


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """First values would overwrite the weights that a run begins with; sums of a fit need float32, and averages would
    overwrite what was fitted."""
    faults = []
    names = [callback.name for callback in recipe.callbacks]
    if "fit_decoder" in names and "ema" in names[names.index("fit_decoder") :]:
        text = "'fit_decoder' stands before 'ema', whose averages overwrite the fitted decoder: put it last"
        faults.append(f"callbacks[{names.index('fit_decoder')}]: {text}")
    for index, callback in enumerate(recipe.callbacks):
        if callback.name in FIRST_VALUES and recipe.transcoder.from_ is not None:
            text = f"{callback.name!r} overwrites the weights of transcoder.from: leave one of them out"
            faults.append(f"callbacks[{index}]: {text}")
        if callback.name == "fit_decoder" and recipe.transcoder.dtype not in ("float32", "float64"):
            faults.append(f"callbacks[{index}]: 'fit_decoder' needs transcoder.dtype = \"float32\"")
    return faults
