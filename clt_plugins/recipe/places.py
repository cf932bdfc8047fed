"""Where a setting belongs that stands in the wrong table: a key of exactly that name in another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import attrs

from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import BY_TABLE, OF_RECIPE
from clt_plugins.contract.types import is_union, recipe_key
from clt_plugins.errors import Faults

if TYPE_CHECKING:
    from clt_plugins.recipe.structure import Pick


def place(table: Mapping[str, Any], pick: Pick, key: str, cls: Any) -> str:
    """What to add to "unknown key": `: it is a setting of [train]`; "" if no table of the recipe has such a key.

    Args:
        table: the recipe's plain tables, which say what is chosen.
        key: what a class does not know.
        cls: that class.
    """
    if key == "name":
        return ""  # a run has one, and so has every choice: it is no sign of another table
    top = {recipe_key(a): _record(a.type) for a in attrs.fields(attrs.resolve_types(Recipe))}
    if cls is not Recipe and key in top:
        if key in BY_TABLE:
            return f": it belongs above the first [table], or in a table of its own, {BY_TABLE[key].bracket}"
        return f": it is a table of its own, [{key}]" if top[key] else ": it belongs above the first [table]"
    tables = [f"[{name}]" for name, record in top.items() if record is not None and _has(record, key)]
    tables += [BY_TABLE[name].bracket for name, config in _chosen(table, pick) if _has(config, key)]
    return f": it is a setting of {' and '.join(dict.fromkeys(tables))}" if tables else ""


def _record(tp: Any) -> Any:
    """The class of one of the engine's own tables; None for a type that is none."""
    members = get_args(tp) if is_union(tp) else (tp,)
    return next((member for member in members if attrs.has(member)), None)


def _chosen(table: Mapping[str, Any], pick: Pick) -> Iterator[tuple[str, Any]]:
    """The tables of a recipe's choices, each with the class of its settings; without those that are not known."""
    for slot in OF_RECIPE:
        stated = table.get(slot.table)
        for one in stated if isinstance(stated, list) else [stated]:
            name = one.get("name") if isinstance(one, Mapping) else one
            if isinstance(name, str):
                try:
                    yield slot.table, pick(slot.table, name).spec.config
                except Faults:
                    continue


def _has(cls: Any, key: str) -> bool:
    return any(recipe_key(a) == key for a in attrs.fields(cls) if a.init)
