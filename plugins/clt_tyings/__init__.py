"""Decoder tyings: untied, per_source, per_target, per_layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class UntiedConfig:
    """A decoder matrix for every (source layer, target layer): y_t = sum over s <= t of a_s W_{s->t} + b_t."""

    skip: bool = False
    """Add x_t S_t, a linear path from each layer's input to its own output."""


@frozen(kw_only=True)
class PerLayerConfig:
    """A decoder matrix for each layer, whose features write to that layer only, y_t = a_t W_t + b_t: per-layer
    transcoders, to compare with cross-layer ones."""

    skip: bool = False
    """Add x_t S_t, a linear path from each layer's input to its own output."""


@frozen(kw_only=True)
class TiedConfig:
    """A decoder shared between layers."""

    feature_offset: bool = False
    """Learn a number per target layer and feature number that is added to active features."""
    feature_scale: bool = False
    """Learn a factor per target layer and feature number for active features, after the offset."""
    skip: bool = False
    """Add x_t S_t, a linear path from each layer's input to its own output."""


@frozen(kw_only=True)
class PerSourceConfig(TiedConfig):
    """One decoder matrix per source layer: y_t = sum over s <= t of g_t(a_s) W_s + b_t."""


@frozen(kw_only=True)
class PerTargetConfig(TiedConfig):
    """One decoder matrix per target layer: y_t = (sum over s <= t of g_t(a_s)) W_t + b_t."""


def build_untied(config: UntiedConfig, context: Context) -> Any:
    from clt_tyings.untied import Untied

    return Untied(context, skip=config.skip)


def build_per_source(config: PerSourceConfig, context: Context) -> Any:
    from clt_tyings.tied import PerSource

    return PerSource(config, context)


def build_per_target(config: PerTargetConfig, context: Context) -> Any:
    from clt_tyings.tied import PerTarget

    return PerTarget(config, context)


def build_per_layer(config: PerLayerConfig, context: Context) -> Any:
    from clt_tyings.per_layer import PerLayer

    return PerLayer(context, skip=config.skip)


@hookimpl
def clt_tyings() -> list[Spec]:
    return [
        Spec("untied", UntiedConfig, build_untied, aliases=("none",)),
        Spec("per_source", PerSourceConfig, build_per_source),
        Spec("per_target", PerTargetConfig, build_per_target),
        Spec("per_layer", PerLayerConfig, build_per_layer),
    ]
