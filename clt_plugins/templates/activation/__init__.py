"""The activation `example`: relu(pre - θ), with a threshold θ learned for each feature (soft thresholding)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Pre-activations less a learned threshold per feature, and zero below it."""

    threshold: float = field(default=0.1, validator=validators.gt(0))
    """First value of every threshold, in units of pre-activations."""


def build(config: ExampleConfig, context: Context) -> Any:
    # torch is imported here and not above: `--help` and `plugins` load this module, too.
    from clt_plugins.templates.activation.module import Example

    return Example(config.threshold, context)


@hookimpl
def clt_activations() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
