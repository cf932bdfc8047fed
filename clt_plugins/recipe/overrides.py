"""`--set KEY=VALUE`: settings from the command line, put into a recipe's raw tables before they are typed.

So they pass the same checks as the file, and a fault in one names the flag.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from datetime import date, time
from typing import Any

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.errors import Fault, Where
from clt_plugins.recipe.moved import moved_key


class Overrides:
    """Some `--set` flags.

    Args:
        texts: `a.b=VALUE`, the value as TOML writes it, or else a bare string. An item of a list is named by its
            choice, `stages.evaluate.tokens=1000`, or counted from 0, `losses.0.weight=5`, `losses[0].weight=5`. A
            choice that is not in the list, and the number after the last one, add an item.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        self.applied: list[tuple[Where, str]] = []

    def apply(self, table: dict[str, Any]) -> list[Fault]:
        """Change `table` in place; returns the faults."""
        faults: list[Fault] = []
        for text in self.texts:
            keys, equals, value = text.partition("=")
            parts = parts_of(keys)
            if not equals or not all(parts):
                faults.append(Fault((), "expected KEY=VALUE, such as train.steps=100", f"--set {text}"))
                continue
            if instead := moved_key(parts):
                faults.append(Fault((), f"has moved: write --set {instead}={value.strip()}", f"--set {text}"))
                continue
            try:
                new: list[Where] = []
                where = put(table, parts, parse(value.strip()), new)
                self.applied += [(path, text) for path in (*new, where)]
            except ValueError as error:
                faults.append(Fault((), str(error), f"--set {text}"))
        return faults

    def locate(self, fault: Fault) -> Fault:
        """The fault with the flag that it comes from as its origin, if it comes from one."""
        for path, text in reversed(self.applied):
            if fault.where == path or (*fault.where, "name") == path:
                return Fault((), whole_list(fault, path, parts_of(text.partition("=")[0])), f"--set {text}")
            if fault.where[: len(path)] == path:
                return attrs.evolve(fault, origin=f"--set {text}")
        return fault


def parse(text: str) -> Any:
    """A TOML value, or the text itself where it is none (`runs/x`, a date)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if parsed.keys() != {"value"} or isinstance(parsed["value"], date | time):
        return text
    return parsed["value"]


def parts_of(key: str) -> list[str]:
    """`losses[0].weight` -> `["losses", "0", "weight"]`."""
    return [part.strip() for part in re.sub(r"\[(\d+)\]", r".\1", key).split(".")]


def whole_list(fault: Fault, path: Where, parts: Sequence[str]) -> str:
    """The text of a fault of a table that was made on the way to a setting: an item's number makes no list."""
    below = list(parts[len(path) :])
    if not below or not below[0].isdecimal() or "expected list" not in fault.text:
        return fault.text
    return f"{fault.text} (write the whole list: {'.'.join(parts[: len(path)])}=[...])"


def put(table: dict[str, Any], parts: list[str], value: Any, new: list[Where] | None = None) -> Where:
    """Set one value, making tables on the way; returns the path, indices as numbers. These tables, and items that are
    added to a list, go into `new`.

    Raises:
        ValueError: the path goes through something that has no inside.
    """
    node: Any = table
    new = [] if new is None else new
    where: list[str | int] = []
    for number, part in enumerate(parts):
        key: str | int = part
        if isinstance(node, list):
            key = _index(node, part, where)
            if key == len(node):
                node.append({} if part.isdecimal() else {"name": part})
                new.append((*where, key))
        elif not isinstance(node, dict):
            raise ValueError(f"{_dotted(where)} is not a table")
        where.append(key)
        if number + 1 == len(parts):
            node[key] = value
            break
        if isinstance(node, dict) and part not in node:
            node[part] = {}
            new.append(tuple(where))
        # A choice may be written as its bare name; then it is a table from here on.
        if isinstance(node[key], str) and where[0] in BY_TABLE:
            node[key] = {"name": node[key]}
        node = node[key]
    return tuple(where)


def _index(items: list[Any], part: str, where: list[str | int]) -> int:
    """The number of an item of a list; that after the last one for a new item.

    Raises:
        ValueError: there is no such number, or there are several of that name.
    """
    if part.isdecimal():
        if int(part) > len(items):
            raise ValueError(f"{_dotted(where)} has {len(items)} items, counted from 0")
        return int(part)
    if where[0] not in BY_TABLE:
        raise ValueError(f"{_dotted(where)} has {len(items)} items, counted from 0: expected a number, got {part!r}")
    named = [n for n, item in enumerate(items) if part == (item.get("name") if isinstance(item, dict) else item)]
    if len(named) > 1:
        numbers = " or ".join(f"{_dotted(where)}.{n}" for n in named)
        raise ValueError(f"{_dotted(where)} has {len(named)} items {part!r}: say {numbers}")
    return named[0] if named else len(items)


def _dotted(where: list[str | int]) -> str:
    return ".".join(map(str, where))
