"""The hooks of a plugin.

A plugin is a module (or package) named by an entry point of the group `clt_plugins`. Each hook is optional, is called
once at set-up, and returns the choices it adds. A complete plugin:

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
from typing import TYPE_CHECKING, Any

import pluggy

from clt_plugins.contract.slots import SLOTS, Slot
from clt_plugins.contract.spec import Format, Spec

if TYPE_CHECKING:
    import click

    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.inspector import Inspector

hookspec = pluggy.HookspecMarker("clt_plugins")
hookimpl = pluggy.HookimplMarker("clt_plugins")


class Hooks:
    """The hook specifications; those that offer choices are added below, one for each slot."""

    @hookspec
    def clt_commands(self) -> Iterable[click.Command]:  # type: ignore[empty-body]
        """Sub-commands for `python -m clt_plugins`."""

    @hookspec
    def clt_formats(self) -> Iterable[Format]:  # type: ignore[empty-body]
        """Formats of other tools that transcoders are read from, besides those of exporters with a `Spec.reader`."""

    @hookspec
    def clt_inspectors(self) -> Iterable[Inspector]:  # type: ignore[empty-body]
        """What says for the command `inspect` what a folder holds that is no transcoder."""

    @hookspec
    def clt_check(self, recipe: Recipe) -> Iterable[str]:  # type: ignore[empty-body]
        """Complaints about a recipe that no single field shows ("activation.k: larger than transcoder.features").

        Called after the recipe is typed, before anything is built; all plugins' complaints are shown together.
        """


def _collecting(slot: Slot) -> Any:
    """The specification of a slot's hook."""

    def collect(self: Hooks) -> Iterable[Spec]:  # type: ignore[empty-body]
        ...

    collect.__name__ = f"clt_{slot.hook}"
    collect.__qualname__ = f"Hooks.{collect.__name__}"
    collect.__doc__ = (
        f"Choices for `{slot.bracket}`: {slot.doc[0].lower()}{slot.doc[1:]}\n\n"
        f"`build(config, context)` returns a `{slot.protocol.__name__}`. {slot.note}".rstrip()
    )
    return hookspec(collect)


for _slot in SLOTS:
    setattr(Hooks, f"clt_{_slot.hook}", _collecting(_slot))
