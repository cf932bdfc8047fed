"""Settings of a recipe that lead to this disk: what must not be published, nor taken from a recipe of somebody else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import attrs

from clt_plugins.contract.spec import Selected
from clt_plugins.contract.types import HubOrPath
from clt_plugins.errors import Fault, Faults, Where, did_you_mean, parse_path
from clt_plugins.recipe.read import recipe_data

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe

ABSOLUTE = re.compile(r"(?:/|~|[A-Za-z]:[\\/]|\\\\).*", re.DOTALL)
"""How paths of this disk begin, on any system."""


@attrs.frozen
class Text:
    """A setting that is a text."""

    where: Where
    text: str
    type: Any = None
    """Of the field that it is in; None where that is not known."""
    free: bool = False
    """Whether it changes only where a run works, and may be left out."""

    def is_local(self) -> bool:
        """Whether it names a file or folder of this disk. An absolute path does anywhere; a relative one in a setting
        that is a path, or that may be one and is there."""
        if ABSOLUTE.fullmatch(self.text) or _names(self.type, Path):
            return True
        return _names(self.type, HubOrPath) and Path(self.text).exists()


def for_others(recipe: Recipe, instead: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tables of a recipe, without paths of this disk: what may be published.

    A setting that changes only where a run works (`FREE_ON_RESUME`) is left out where it is such a path.

    Args:
        instead: what others are to read: `{"model.path": "openai-community/gpt2"}`.

    Returns:
        The tables; and the texts that they had, each with what is written instead (nothing, where it is left out).

    Raises:
        Faults: a setting is a path of this disk, and `instead` does not have it, or has such a path too; or `instead`
            has a setting that is no text of the recipe. A line for each.
    """
    tables, texts = recipe_data(recipe), dict[str, str]()
    said = {parse_path(setting): text for setting, text in instead.items()}
    known = {one.where: one for one in _texts(recipe, ())}
    faults = []
    for where in said.keys() - known.keys():
        near = did_you_mean(Fault(where, "").path, [Fault(one, "").path for one in known])
        faults.append(Fault(where, f"the recipe has no such text{near}"))
    for where, one in known.items():
        if where in said and ABSOLUTE.fullmatch(said[where]):
            faults.append(Fault(where, f"{said[where]!r} is a path of this disk too: say what others are to read"))
        elif where in said:
            texts[one.text] = said[where]
            _put(tables, where, said[where])
        elif one.is_local() and one.free:
            texts[one.text] = ""
            _put(tables, where, None)
        elif one.is_local():
            faults.append(Fault(where, f"{one.text!r} is a path of this disk: say what others are to read instead"))
    if faults:
        raise Faults(faults)
    return tables, texts


def check_foreign(recipe: Recipe, origin: str) -> None:
    """Refuse a recipe of somebody else that would read files of this disk, or open an address that it names.

    Args:
        origin: where the recipe is from.

    Raises:
        Faults: it would; a line for each setting.
    """
    faults = []
    for one in _texts(recipe, ()):
        kind = "a path of this disk" if one.is_local() else "an address" if "://" in one.text else None
        if kind is not None:
            remedy = "write what you trust in a recipe of your own, and give it with --recipe"
            text = f"{one.text[:100]!r}: a recipe from the hub may not name {kind}: {remedy}"
            faults.append(Fault(one.where, text, origin))
    if faults:
        raise Faults(faults)


def _texts(value: Any, where: Where, tp: Any = None, free: bool = False) -> Iterator[Text]:
    """All texts in the settings that may name something: not those marked as `FREE_TEXT`."""
    if isinstance(value, Selected):
        yield from _texts(value.config, where)
    elif attrs.has(type(value)):
        for a in attrs.fields(attrs.resolve_types(type(value))):
            if a.init and not a.metadata.get("free_text"):
                can_go = bool(a.metadata.get("free_on_resume")) and a.default is not attrs.NOTHING
                yield from _texts(getattr(value, a.name), (*where, a.alias), a.type, can_go)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(one, (*where, key), tp)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _texts(one, (*where, number), tp)
    elif isinstance(value, str | Path):
        yield Text(where, str(value), tp, free)


def _put(tables: Any, where: Where, text: str | None) -> None:
    """Write a setting into plain tables; None leaves it out."""
    for part in where[:-1]:
        tables = tables[part]
    if text is None:
        del tables[where[-1]]
    else:
        tables[where[-1]] = text


def _names(tp: Any, searched: Any) -> bool:
    """Whether a type is another one, or has it in a union, list or dictionary."""
    return tp is searched or any(_names(part, searched) for part in get_args(tp))
