"""Changes of batches before they are normalised: drop_outliers, drop_positions, drop_tokens, subsample, noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class DropOutliersConfig:
    """Drop tokens whose input, in any layer, has at least `factor` times the mean norm of that layer's inputs, the mean
    over the tokens of the batch; as ByteDance's training of cross-layer transcoders does. One number per batch is read
    back from a GPU."""

    factor: float = field(default=20.0, validator=validators.gt(1))
    """How many times the mean norm."""
    held_out: bool = True
    """Whether they are dropped from held-out batches too."""


@frozen(kw_only=True)
class DropPositionsConfig:
    """Drop the first tokens of each context, whose activations are like no others. The source must know positions."""

    first: int = field(default=1, validator=validators.gt(0))
    """How many tokens of each context."""
    held_out: bool = True
    """Whether they are dropped from held-out batches too."""


@frozen(kw_only=True)
class DropTokensConfig:
    """Drop tokens by their id in the vocabulary, such as end-of-text. The source must know token ids."""

    ids: list[int] = field(validator=validators.min_len(1), metadata={"example": [0]})
    """Which ones."""
    held_out: bool = True
    """Whether they are dropped from held-out batches too."""


@frozen(kw_only=True)
class SubsampleConfig:
    """Keep each token with a probability, independently; so neighbours in a text come together less often."""

    share: float = field(default=0.5, validator=[validators.gt(0), validators.lt(1)])
    """The probability."""


@frozen(kw_only=True)
class NoiseConfig:
    """Add normal noise, in training only. The draws are other ones on another kind of device."""

    inputs: float = field(default=0.1, validator=validators.ge(0))
    """Its standard deviation on inputs, as a share of the root mean square, over dimensions, of each token's input in
    each layer."""
    targets: float = field(default=0.0, validator=validators.ge(0))
    """The same for targets."""


def build_drop_outliers(config: DropOutliersConfig, context: Context) -> Any:
    from clt_transforms.drop import DropOutliers

    return DropOutliers(config)


def build_drop_positions(config: DropPositionsConfig, context: Context) -> Any:
    from clt_transforms.drop import DropPositions

    return DropPositions(config)


def build_drop_tokens(config: DropTokensConfig, context: Context) -> Any:
    from clt_transforms.drop import DropTokens

    return DropTokens(config)


def build_subsample(config: SubsampleConfig, context: Context) -> Any:
    from clt_transforms.draw import Subsample

    return Subsample(config, context)


def build_noise(config: NoiseConfig, context: Context) -> Any:
    from clt_transforms.draw import Noise

    return Noise(config, context)


@hookimpl
def clt_transforms() -> list[Spec]:
    return [
        Spec("drop_outliers", DropOutliersConfig, build_drop_outliers),
        Spec("drop_positions", DropPositionsConfig, build_drop_positions),
        Spec("drop_tokens", DropTokensConfig, build_drop_tokens),
        Spec("subsample", SubsampleConfig, build_subsample),
        Spec("noise", NoiseConfig, build_noise),
    ]
