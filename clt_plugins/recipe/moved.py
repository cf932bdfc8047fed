"""Settings that stand elsewhere in a recipe than they did; an old one is refused, with the line to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clt_plugins.errors import Fault
from clt_plugins.toml import inline, key

Elsewhere = Callable[[Any], dict[str, Any]]
"""From an old setting's value to the tables that say the same now."""


def _to(table: str, setting: str) -> Elsewhere:
    """A setting that is one of another table now."""
    return lambda value: {table: {setting: value}}


def _stage(name: str) -> Elsewhere:
    """A table that is a stage now."""
    return lambda value: {"stages": [{"name": name, **(value if isinstance(value, Mapping) else {})}]}


def _exports(value: Any) -> dict[str, Any]:
    """Each export is a stage, and each folder has one name."""
    formats = [
        {"name": one} if isinstance(one, str) else one
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, str | Mapping)
    ]
    stages: list[dict[str, Any]] = []
    for number, one in enumerate(formats):
        earlier = sum(other.get("name") == one.get("name") for other in formats[:number])
        again = {"folder": f"{one.get('name')}.{earlier + 1}"} if earlier else {}
        stages.append({"name": "export", "format": dict(one), **again})
    return {"stages": stages}


MOVED: Mapping[str, Elsewhere] = {"convert": _stage("convert"), "evaluate": _stage("evaluate"), "exports": _exports}
"""What became of a table (`convert`) or a setting (`train.optimizer`)."""


def refuse_moved(table: dict[str, Any]) -> list[Fault]:
    """Take settings that have moved out of a recipe's plain tables; returns a fault for each.

    Each fault has the complete line of the new table: with what the recipe says of it already, or its default choice,
    and all that has moved there.
    """
    found: dict[str, dict[str, Any]] = {}
    for old, elsewhere in MOVED.items():
        name, _, setting = old.partition(".")
        inside = table.get(name) if setting else table
        if isinstance(inside, dict) and inside.get(setting or name) is not None:
            found[old] = elsewhere(inside.pop(setting or name))
    now: dict[str, Any] = {}
    for tables in found.values():
        for name, value in tables.items():
            now[name] = _merged(now.get(name, table.get(name)), value)
    return [
        Fault(tuple(old.split(".")), f"has moved: write instead {_lines({name: now[name] for name in tables})}")
        for old, tables in found.items()
    ]


def _merged(stated: Any, value: Any) -> Any:
    """A choice's table or list with more in it."""
    if isinstance(value, list):
        return [*(stated if isinstance(stated, list) else []), *value]
    stated = {"name": stated} if isinstance(stated, str) else stated
    return {**(stated if isinstance(stated, Mapping) else {}), **value}


def _lines(tables: Mapping[str, Any]) -> str:
    """`optimizer = {name = "adamw"}`: a line that stands before the first `[table]`."""
    return ", ".join(f"`{key(name)} = {inline(value)}`" for name, value in tables.items())
