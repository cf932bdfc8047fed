"""The tying `example`: each feature writes to its own layer only, as in a transcoder of a single layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Tying


@frozen(kw_only=True)
class ExampleConfig:
    """One decoder matrix per layer, for the features of that layer: y_t = a_t W_t + b_t."""

    scale: float = field(default=1.0, validator=validators.gt(0))
    """Multiplies the bound of the decoder's first values, 1 / sqrt(L · D)."""


def build(config: ExampleConfig, context: Context) -> Tying:
    """Called once, when the transcoder is built."""
    # torch is imported here: this file is also loaded by `--help` and `plugins`, which must start quickly.
    from clt_plugins.templates.tying.module import Example

    return Example(config.scale, context)


@hookimpl
def clt_tyings() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
