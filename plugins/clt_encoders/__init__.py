"""Encoders: plain, tied, low_rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class PlainConfig:
    """A matrix per layer: pre = x W + b."""

    pre_bias: bool = False
    """Learn a vector per layer that is subtracted from the inputs first. (Sparse autoencoders subtract the decoder's
    bias; a transcoder writes elsewhere than it reads, so that it has one of its own.)"""


@frozen(kw_only=True)
class TiedConfig:
    """The decoder's rows for a feature's own layer, transposed, are the encoder's (Cunningham et al. 2023, arXiv
    2309.08600): for transcoders that read and write the same stream."""

    normalise: bool = False
    """Divide each row by its norm, so that the decoder's size is no gain of the encoder."""
    scale: bool = False
    """Learn a factor for each feature, from 1 on."""


@frozen(kw_only=True)
class LowRankConfig:
    """A matrix per layer that is a product of two: pre = x P W + b, where x P has `rank` numbers."""

    rank: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Numbers that a layer's features read; a quarter of d_model, rounded up, if not given."""


def build_plain(config: PlainConfig, context: Context) -> Any:
    from clt_encoders.plain import Plain

    return Plain(config, context)


def build_tied(config: TiedConfig, context: Context) -> Any:
    from clt_encoders.tied import Tied

    return Tied(config, context)


def build_low_rank(config: LowRankConfig, context: Context) -> Any:
    from clt_encoders.low_rank import LowRank

    return LowRank(config, context)


@hookimpl
def clt_encoders() -> list[Spec]:
    return [
        Spec("plain", PlainConfig, build_plain),
        Spec("tied", TiedConfig, build_tied),
        Spec("low_rank", LowRankConfig, build_low_rank),
    ]
