"""The hooks of a plugin. Each is optional, is called once at set-up, and returns the choices it adds.

A plugin is a module (or package) named by an entry point of the group `clt_plugins`. A whole one:

```python
from attrs import field, frozen, validators
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class SquareConfig:
    '''Penalise the square of the features.'''
    weight: float = field(default=1e-3, validator=validators.ge(0))
    '''Multiplies the term.'''

class Square:
    needs_pre = False
    def __init__(self, weight):
        self.weight = weight
    def selection(self, tokens, idle_tokens):
        return None
    def __call__(self, forward):
        tokens = forward.features.shape[0]
        return {"square": self.weight * forward.features.values.square().sum() / tokens}

@hookimpl
def clt_losses():
    return [Spec("square", SquareConfig, lambda config, context: Square(config.weight))]
```
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from clt_plugins.contract.spec import Spec

if TYPE_CHECKING:
    import click

    from clt_plugins.recipe.read import Recipe

hookspec = pluggy.HookspecMarker("clt_plugins")
hookimpl = pluggy.HookimplMarker("clt_plugins")

SLOTS = {
    "activations": "activation",
    "tyings": "tying",
    "sources": "source",
    "losses": "losses",
    "loggers": "loggers",
    "parallel": "parallel",
    "kernels": "kernels",
    "exporters": "exports",
}
"""Hook (without `clt_`) -> the recipe table that it offers choices for."""


class Hooks:
    """The hook specifications."""

    @hookspec
    def clt_activations(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[activation]`: what turns pre-activations into features.

        `build` returns an `interfaces.Activation`, a `torch.nn.Module`.
        """

    @hookspec
    def clt_tyings(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[tying]`: the decoder.

        `build` returns an `interfaces.Tying`, a `torch.nn.Module`.
        """

    @hookspec
    def clt_sources(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[source]`: where activations come from.

        `build` returns an `interfaces.Source`. It is built before the transcoder: `context.layers` is 0.
        """

    @hookspec
    def clt_losses(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[[losses]]`: terms of the training loss.

        `build` returns an `interfaces.Loss`.
        """

    @hookspec
    def clt_loggers(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[[loggers]]`: sinks of metrics.

        `build` returns an `interfaces.Logger`; it may write below `context.folder`.
        """

    @hookspec
    def clt_parallel(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[parallel]`: how features and tokens are split over ranks.

        `build(config, device)` returns an `interfaces.Parallel`; there is no context yet. For the device "meta" it must
        not wait for other processes: only sizes are asked for.
        """

    @hookspec
    def clt_kernels(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[kernels]`: sparse products for a device.

        `build(config, device)` returns an `interfaces.Kernels`; there is no context yet.
        """

    @hookspec
    def clt_exporters(self) -> Iterable[Spec]:  # type: ignore[empty-body]
        """Choices for `[[exports]]`: formats of other tools.

        `build` returns an `interfaces.Exporter`; with a method `check`, it is asked before training.
        """

    @hookspec
    def clt_commands(self) -> Iterable[click.Command]:  # type: ignore[empty-body]
        """Sub-commands for `python -m clt_plugins`."""

    @hookspec
    def clt_check(self, recipe: Recipe) -> Iterable[str]:  # type: ignore[empty-body]
        """Complaints about a recipe that no single field shows ("activation.k: larger than transcoder.features").

        Called after the recipe is typed, before anything is built; all plugins' complaints are shown together.
        """
