"""The activation `example`: relu(pre - θ), with a learned threshold θ for each feature (soft thresholding)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Activation, Context


@frozen(kw_only=True)
class ExampleConfig:
    """Pre-activations minus a learned threshold per feature, and zero below it."""

    threshold: float = field(default=0.1, validator=validators.gt(0))
    """First value of every threshold, in units of pre-activations."""


def build(config: ExampleConfig, context: Context) -> Activation:
    """Called once, when the transcoder is built."""
    # torch is imported here: this file is also loaded by `--help` and `plugins`, which must start quickly.
    from clt_plugins.templates.activation.module import Example

    return Example(config.threshold, context)


@hookimpl
def clt_activations() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
