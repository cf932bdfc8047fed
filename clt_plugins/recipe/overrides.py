"""`--set KEY=VALUE`: settings from the command line, put into a recipe's raw tables before they are typed.

So they pass the same checks as the file, and a fault in one names the flag.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from datetime import date, time
from typing import Any

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.errors import Fault, Where


class Overrides:
    """Some `--set` flags.

    Args:
        texts: `a.b=VALUE`, the value as TOML writes it, or else a bare string; `losses.0.weight=5` counts items from 0,
            and the index after the last one adds an item.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)
        self.applied: list[tuple[Where, str]] = []

    def apply(self, table: dict[str, Any]) -> list[Fault]:
        """Change `table` in place; returns the faults."""
        faults: list[Fault] = []
        for text in self.texts:
            keys, equals, value = text.partition("=")
            parts = [part.strip() for part in keys.split(".")]
            if not equals or not all(parts):
                faults.append(Fault((), "expected KEY=VALUE, such as train.steps=100", f"--set {text}"))
                continue
            try:
                self.applied.append((_put(table, parts, parse(value.strip())), text))
            except ValueError as error:
                faults.append(Fault((), str(error), f"--set {text}"))
        return faults

    def locate(self, fault: Fault) -> Fault:
        """The fault with the flag that it comes from as its origin, if it comes from one."""
        for path, text in reversed(self.applied):
            if fault.where == path or (*fault.where, "name") == path:
                return Fault((), fault.text, f"--set {text}")
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


def _put(table: dict[str, Any], parts: list[str], value: Any) -> Where:
    """Set one value, making tables on the way; returns the path, indices as numbers.

    Raises:
        ValueError: the path goes through something that has no inside.
    """
    node: Any = table
    where: list[str | int] = []
    for number, part in enumerate(parts):
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
        if number + 1 == len(parts):
            node[key] = value
            break
        if isinstance(node, dict):
            node.setdefault(part, {})
        # A choice may be written as its bare name; then it is a table from here on.
        if isinstance(node[key], str) and where[0] in BY_TABLE:
            node[key] = {"name": node[key]}
        node = node[key]
    return tuple(where)


def _dotted(where: list[str | int]) -> str:
    return ".".join(map(str, where))
