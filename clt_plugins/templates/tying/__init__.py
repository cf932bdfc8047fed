"""The tying `example`: each feature writes to its own layer only, as in a transcoder of a single layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """One decoder matrix per layer, read by the features of that layer: y_t = a_t W_t + b_t."""

    scale: float = field(default=1.0, validator=validators.gt(0))
    """Multiplies the bound of the decoder's first values, 1 / sqrt(L · D)."""


def build(config: ExampleConfig, context: Context) -> Any:
    # torch is imported here and not above: `--help` and `plugins` load this module, too.
    from clt_plugins.templates.tying.module import Example

    return Example(config.scale, context)


@hookimpl
def clt_tyings() -> list[Spec]:
    return [Spec("example", ExampleConfig, build)]
