"""The logger `wandb`: Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import field, frozen, validators

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Logger


@frozen(kw_only=True)
class WandbConfig:
    """Curves, values per layer and histograms at wandb.ai, or in `wandb/` of the run's folder."""

    project: str = field(default="clt-plugins", validator=validators.min_len(1))
    """The project that the run appears in."""
    entity: str | None = None
    """The user or team; wandb's default if not given."""
    mode: Literal["online", "offline"] = "online"
    """Send while training; or write files only, for `wandb sync` later."""


def build(config: WandbConfig, context: Context) -> Logger:
    from clt_wandb.logger import Wandb

    if context.folder is None:
        raise Refused("loggers", "wandb writes into the run's folder, and this run has none; use another logger")
    return Wandb(config, context.folder)


@hookimpl
def clt_loggers() -> list[Spec]:
    return [Spec("wandb", WandbConfig, build)]
