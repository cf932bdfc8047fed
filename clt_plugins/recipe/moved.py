"""Settings that stand elsewhere in a recipe than they did.

A recipe with an old one is refused, with what to write instead, and where. What an older run has written is read all
the same.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.errors import Fault
from clt_plugins.recipe.lines import stated_at
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


MOVED: Mapping[str, Elsewhere] = {
    "transcoder.normalisation": _to("normalisation", "name"),
    "transcoder.normalisation_tokens": _to("train", "statistics_tokens"),
    "train.optimizer": _to("optimizer", "name"),
    "train.betas": _to("optimizer", "betas"),
    "train.eps": _to("optimizer", "eps"),
    "train.weight_decay": _to("optimizer", "weight_decay"),
    "train.states": _to("optimizer", "states"),
    "train.bf16_weights": _to("optimizer", "bf16_weights"),
    "train.schedule": _to("schedule", "name"),
    "train.warmup_steps": _to("schedule", "warmup_steps"),
    "convert": _stage("convert"),
    "evaluate": _stage("evaluate"),
    "exports": _exports,
}
"""What became of a table (`convert`) or a setting (`train.optimizer`)."""


STAGES = ("convert", "evaluate")
"""Tables whose settings `--set` finds by the name of a stage now."""


def moved_key(keys: Sequence[str]) -> str:
    """Where the setting stands now that a `--set` flag or a sweep names: `optimizer.eps`; "" where it has not moved, or
    is more than one setting now."""
    if keys[0] in STAGES and len(keys) > 1:
        return ".".join(["stages", *keys])
    elsewhere = MOVED.get(".".join(keys))
    for table, value in (elsewhere(None) if elsewhere else {}).items():
        if isinstance(value, Mapping):
            return ".".join([table, *value])
    return ""


def move(table: dict[str, Any], text: str = "") -> list[Fault]:
    """Put settings in a recipe's plain tables where they stand now; returns a fault for each that has moved.

    Args:
        text: the recipe's file. It says whether a new table is in it already, since TOML has each table once.
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
    stated = {name: table.get(name) for name in now}
    table.update(now)

    def remedies(tables: Mapping[str, Any]) -> str:
        return "; ".join(_remedy(name, value, now[name], stated[name], text) for name, value in tables.items())

    return [Fault(tuple(old.split(".")), remedies(tables)) for old, tables in found.items()]


def _merged(stated: Any, value: Any) -> Any:
    """A choice's table or list with more in it."""
    if isinstance(value, list):
        return [*(stated if isinstance(stated, list) else []), *value]
    stated = {"name": stated} if isinstance(stated, str) else stated
    return {**(stated if isinstance(stated, Mapping) else {}), **value}


def _remedy(name: str, value: Any, whole: Any, stated: Any, text: str) -> str:
    """What to write, and where: into the table, if the file has it as `[table]`; else the complete line of the table.

    Args:
        name: of the new table.
        value: what has moved there.
        whole: all that the table holds now.
        stated: what the recipe says of the table already.
    """
    bracket = BY_TABLE[name].bracket if name in BY_TABLE else f"[{name}]"
    line, is_head = stated_at(text, name) or (None, False)
    if is_head or name not in BY_TABLE:
        tables = value if isinstance(value, list) else [value]
        settings = [", ".join(f"`{key(setting)} = {inline(item)}`" for setting, item in one.items()) for one in tables]
        if isinstance(value, list):
            return "has moved: write at the end " + ", ".join(f"{bracket} with {one}" for one in settings)
        again = [f"`{key(setting)}`" for setting in value if isinstance(stated, Mapping) and setting in stated]
        instead = f" in place of its own {' and '.join(again)}" if again else ""
        return f"has moved: write {settings[0]} in {bracket}{instead}"
    # A choice without settings may be its bare name.
    bare = isinstance(whole, Mapping) and whole.keys() == {"name"}
    complete = f"`{key(name)} = {inline(whole['name'] if bare else whole)}`"
    where = f"in place of line {line}" if line else "above the first [table]"
    if line and not _alone(text.splitlines()[line - 1], name, stated):
        where += f" and of what else the file says of `{key(name)}`"
    return f"has moved to {bracket}: write {complete} {where}"


def _alone(line: str, name: str, stated: Any) -> bool:
    """Whether a line says all that a file states of a table: neither dotted keys nor a list of several lines do."""
    try:
        return bool(tomllib.loads(line) == {name: stated})
    except tomllib.TOMLDecodeError:
        return False
