"""What a plugin offers, a `Spec` for each choice; and what a recipe's table becomes, a `Selected`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field

if TYPE_CHECKING:
    from clt_plugins.contract.reading.source import Outline

__version__ = "0.1.0"

API_VERSION = 1
"""The plugin contract's version. A plugin that says `CLT_API = 1` is refused when this is another number."""

FREE_ON_RESUME: Mapping[str, Any] = {"free_on_resume": True}
"""`field(..., metadata=FREE_ON_RESUME)` marks a setting of a choice that changes where or how fast something is
computed, not what, or a rate that is changed on purpose in the middle of a run: a run may be resumed with another value
of it."""

FREE_TEXT: Mapping[str, Any] = {"free_text": True}
"""`field(..., metadata=FREE_TEXT)` marks a setting that is text for people or for a language model, such as a prompt.
It names nothing to be read, though it may look like a path or an address, and is published as it is."""


def default_choice(stated: str | Mapping[str, Any] | list[Any]) -> Any:
    """The default of a setting that is a choice itself, as a recipe would write it.

    `schedule: Annotated[Selected, "schedule"] = default_choice("linear")`: the name of a choice, its table
    (`{"name": "constant", "warmup_steps": 0}`), or a list of such.
    """
    return field(metadata={"default": stated})


@attrs.frozen
class Spec:
    """One choice for one table of a recipe."""

    name: str
    """What the recipe says."""
    config: type
    """A frozen, keyword-only attrs class of plain TOML types, `Path`, `Literal` and other choices
    (`Annotated[Selected, "table"]`), documented field by field."""
    build: Callable[..., Any]
    """`build(config, context)` returns the object that the hook's documentation asks for. Import heavy things inside.
    A setting that cannot work is refused by `raise Refused("table.key", "what is wrong and what to do")`."""
    aliases: tuple[str, ...] = ()
    """Older names that recipes may still use."""
    reader: Callable[[], Any] | None = None
    """Of an exporter whose format can be read back: makes a `ReadsBack`, for which no settings are needed."""
    outline: Callable[..., Outline] | None = None
    """Of a source that is heavy to build: `outline(config, context)` says what `plan` has to know of it, without data
    or weights. Where `context.n_layers` and `d_model` are not 0, the user has given them. A source without it is built
    for a plan too."""


@attrs.frozen
class Format:
    """A format of another tool that transcoders are read from, where no exporter's `Spec.reader` does that: because the
    format is not written, or because what is written is only a part of a transcoder."""

    name: str
    """What people call it."""
    doc: str
    """Whose it is, and what is read, in a sentence."""
    reader: Callable[[], Any]
    """Makes a `ReadsBack`, for which no settings are needed. Import heavy things inside."""


@attrs.frozen
class Choice:
    """One choice, and who offers it."""

    spec: Spec
    slot: str = ""
    """The recipe's table."""
    plugin: str = ""
    distribution: str = ""
    """With version: `clt-plugins 0.1.0`."""
    file: str = ""
    """The plugin's module, or its package's `__init__.py`."""

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.distribution})"


@attrs.frozen
class Selected:
    """What a recipe's table becomes: the choice and its typed settings."""

    choice: Choice
    config: Any

    @property
    def spec(self) -> Spec:
        return self.choice.spec

    @property
    def name(self) -> str:
        return self.choice.spec.name
