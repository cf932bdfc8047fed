"""`--set KEY=VALUE`: settings from the command line, put into a recipe's raw tables before they are typed.

So they pass the same checks as the file, and a fault in one names the flag.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from datetime import date, time
from typing import Any

from clt_plugins.contract.hooks import SLOTS
from clt_plugins.recipe.structure import Fault, Where


class Overrides:
    """Some `--set` flags.

    Args:
        texts: `a.b=VALUE`, the value as TOML writes it, or else a bare string; `losses.0.weight=5` counts items from 0,
            and the index after the last one adds an item.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        self.places: list[tuple[Where, str]] = []

    def apply(self, table: dict[str, Any]) -> list[str]:
        """Change `table` in place; returns the faults, a line each."""
        faults = []
        for text in self.texts:
            keys, equals, value = text.partition("=")
            parts = [part.strip() for part in keys.split(".")]
            if not equals or not all(parts):
                faults.append(f"--set {text}: expected KEY=VALUE, such as train.steps=100")
                continue
            try:
                self.places.append((_put(table, parts, parse(value.strip())), text))
            except ValueError as error:
                faults.append(f"--set {text}: {error}")
        return faults

    def line(self, fault: Fault, source: str) -> str:
        """A fault as the user sees it: named by the flag it comes from, else by the file."""
        for place, text in reversed(self.places):
            if fault.where == place or (*fault.where, "name") == place:
                return f"--set {text}: {fault.text}"
            if fault.where[: len(place)] == place:
                return f"--set {text}: {fault}"
        return f"{source}: {fault}"


def parse(text: str) -> Any:
    """A TOML value, or the text itself where it is none (`runs/x`, a date)."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if found.keys() != {"value"} or isinstance(found["value"], date | time):
        return text
    return found["value"]


def _put(table: dict[str, Any], parts: list[str], value: Any) -> Where:
    """Set one value, making tables on the way; returns the path, indices as numbers.

    Raises:
        ValueError: the path goes through something that has no inside.
    """
    node: Any = table
    where: list[str | int] = []
    for part, more in _with_next(parts):
        key: str | int = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) > len(node):
                raise ValueError(f"{_dotted(where)} has {len(node)} items, counted from 0")
            key = int(part)
            if key == len(node):
                node.append({})
        elif not isinstance(node, dict):
            raise ValueError(f"{_dotted(where)} is not a table")
        where.append(key)
        if not more:
            node[key] = value
            break
        if isinstance(node, dict):
            node.setdefault(part, {})
        # A choice may be written as its bare name; then it is a table from here on.
        if isinstance(node[key], str) and where[0] in SLOTS.values():
            node[key] = {"name": node[key]}
        node = node[key]
    return tuple(where)


def _with_next(parts: list[str]) -> Iterable[tuple[str, bool]]:
    return ((part, index + 1 < len(parts)) for index, part in enumerate(parts))


def _dotted(where: list[str | int]) -> str:
    return ".".join(map(str, where))
