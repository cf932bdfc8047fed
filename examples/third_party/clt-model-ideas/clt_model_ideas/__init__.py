"""Five choices: the normalisation `robust`, the encoder `gain`, the transform `drop_repeats`, the loss
`jensen_shannon` and the stage `feature_norms`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_model_ideas.drop_repeats import clt_transforms
from clt_model_ideas.feature_norms import clt_stages
from clt_model_ideas.jensen_shannon import clt_losses
from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Encoder, Normalisation

__all__ = ["clt_encoders", "clt_losses", "clt_normalisations", "clt_stages", "clt_transforms"]


@frozen(kw_only=True)
class RobustConfig:
    """Each dimension gets the median 0 and, scaled as for normal numbers, the median absolute deviation 1."""

    sample: int = field(default=1024, validator=validators.ge(2))
    """Tokens that medians are taken of, on any number of ranks. Fewer tokens are all used."""


@frozen(kw_only=True)
class GainConfig:
    """A matrix per layer on shifted and stretched inputs: pre = ((x - shift) · gain) W + b, both learned."""

    gain: float = field(default=1.0, validator=validators.gt(0))
    """The first gain of every dimension."""


def build_robust(config: RobustConfig, context: Context) -> Normalisation:
    # Modules that need torch are imported here: `--help` and `plugins` import this file.
    from clt_model_ideas.robust import Robust

    return Robust(config.sample, context)


def build_gain(config: GainConfig, context: Context) -> Encoder:
    from clt_model_ideas.gain import Gain

    return Gain(config.gain, context)


@hookimpl
def clt_normalisations() -> list[Spec]:
    return [Spec("robust", RobustConfig, build_robust)]


@hookimpl
def clt_encoders() -> list[Spec]:
    return [Spec("gain", GainConfig, build_gain)]
