"""Which line of a recipe's file a setting stands on."""

from __future__ import annotations

import re

from clt_plugins.errors import Where


def line_of(text: str, where: Where) -> int | None:
    """The line (from 1) of a setting such as `("losses", 1, "weight")`; of its table where the key is not written.

    None where the file says nothing of the table: a default, or a `--set` flag.
    """
    lines = text.splitlines()
    first, stop = 0, len(lines)
    """The lines that the table found so far takes, those of the tables in it included."""
    found: int | None = None
    path = ""
    for name, number in _steps(where):
        path = f"{path}.{name}" if path else name
        heads = [n for n in range(first, stop) if _head(lines[n]) == path]
        if len(heads) <= number:
            return _assigned(lines, first, name) or found
        first = heads[number] + 1
        found = first
        ends = (n for n in range(first, stop) if (head := _head(lines[n])) and not head.startswith(f"{path}."))
        stop = next(ends, stop)
    return found


def stated_at(text: str, table: str) -> tuple[int, bool] | None:
    """The line (from 1) where a file states a table of the recipe, and whether that is a head, `[table]`, or else
    `table = ...`; None where it does not."""
    number = line_of(text, (table,))
    return None if number is None else (number, bool(_head(text.splitlines()[number - 1])))


def _steps(where: Where) -> list[tuple[str, int]]:
    """The names of a path, each with the number of the one that is meant: `[("losses", 1), ("weight", 0)]`."""
    steps: list[tuple[str, int]] = []
    for part in where:
        if isinstance(part, str):
            steps.append((part, 0))
        elif steps:
            steps[-1] = (steps[-1][0], part)
    return steps


def _head(line: str) -> str:
    """`losses.schedule` of a line `[losses.schedule]` or `[[losses.schedule]]`; "" of others."""
    match = re.match(r"\s*\[\[?\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*\]\]?\s*(#.*)?$", line)
    return re.sub(r"\s", "", match[1]) if match else ""


def _assigned(lines: list[str], first: int, key: str) -> int | None:
    """The line of `key = ...` before the next table."""
    for n in range(first, len(lines)):
        if _head(lines[n]):
            return None
        if re.match(rf"\s*([\"']?){re.escape(key)}\1\s*[=.]", lines[n]):
            return n + 1
    return None
