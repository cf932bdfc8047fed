"""The encoder `example`: each dimension of the inputs is weighted before features read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Encoder


@frozen(kw_only=True)
class ExampleConfig:
    """A matrix per layer on inputs whose dimensions have learned weights: pre = (x · exp(s)) W + b."""

    weight: float = field(default=1.0, validator=validators.gt(0))
    """The first weight of every dimension."""


def build(config: ExampleConfig, context: Context) -> Encoder:
    """Called once, when the transcoder is built."""
    # torch is imported here: this file is also loaded by `--help` and `plugins`, which must start quickly.
    from clt_plugins.templates.encoder.module import Example

    return Example(config.weight, context)


@hookimpl
def clt_encoders() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
