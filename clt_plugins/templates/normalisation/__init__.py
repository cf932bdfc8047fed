"""The normalisation `example`: each layer is divided by its mean absolute activation, which outliers move little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Normalisation


@frozen(kw_only=True)
class ExampleConfig:
    """Each layer is divided by one number, so that its mean absolute activation is `size`."""

    size: float = field(default=1.0, validator=validators.gt(0))
    """The mean absolute activation afterwards."""


def build(config: ExampleConfig, context: Context) -> Normalisation:
    """Called once, when the transcoder is built."""
    # torch is imported here: this file is also loaded by `--help` and `plugins`, which must start quickly.
    from clt_plugins.templates.normalisation.module import Example

    return Example(config.size, context)


@hookimpl
def clt_normalisations() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
