"""Settings that stand elsewhere in a recipe than they did.

A recipe with an old one is refused, with the line to write instead. What an older run has written is read all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clt_plugins.contract.slots import BY_TABLE
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


def moved_flag(keys: Sequence[str]) -> str:
    """What to write instead of a `--set` flag's keys; "" where they stand."""
    return ".".join(["stages", *keys]) if keys[0] in STAGES and len(keys) > 1 else ""


def move(table: dict[str, Any]) -> list[Fault]:
    """Put settings in a recipe's plain tables where they stand now; returns a fault for each that has moved.

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
    table.update(now)
    return [
        Fault(tuple(old.split(".")), f"has moved: write instead {_lines(tables, now)}") for old, tables in found.items()
    ]


def _merged(stated: Any, value: Any) -> Any:
    """A choice's table or list with more in it."""
    if isinstance(value, list):
        return [*(stated if isinstance(stated, list) else []), *value]
    stated = {"name": stated} if isinstance(stated, str) else stated
    return {**(stated if isinstance(stated, Mapping) else {}), **value}


def _lines(tables: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`optimizer = {name = "adam", eps = 1e-6}`: a line that stands before the first `[table]`; or, of one of the
    engine's own tables, the setting: "`statistics_tokens = 64` in [train]".

    Args:
        now: the tables with all that they hold.
    """
    lines = []
    for name, value in tables.items():
        if name in BY_TABLE:
            whole = now[name]
            # A choice without settings may be its bare name.
            bare = isinstance(whole, Mapping) and whole.keys() == {"name"}
            lines.append(f"`{key(name)} = {inline(whole['name'] if bare else whole)}`")
        else:
            lines += [f"`{key(setting)} = {inline(item)}` in [{name}]" for setting, item in value.items()]
    return ", ".join(lines)
