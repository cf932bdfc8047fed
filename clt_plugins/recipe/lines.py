"""Which line of a recipe's file a setting stands on."""

from __future__ import annotations

import re

from clt_plugins.errors import Where


def line_of(text: str, where: Where) -> int | None:
    """The line (from 1) of a setting such as `("losses", 1, "weight")`; of its table where the key is not written.

    None where the file says nothing of the table: a default, or a `--set` flag.
    """
    table, *rest = where
    number = rest.pop(0) if rest and isinstance(rest[0], int) else 0
    key = next((part for part in rest if isinstance(part, str)), None)
    lines = text.splitlines()
    heads = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[?\s*{re.escape(str(table))}\s*\]\]?", line)]
    if len(heads) > int(number):
        head = heads[int(number)]
        return (_assigned(lines, head + 1, key) if key is not None else None) or head + 1
    return _assigned(lines, 0, str(table))


def _assigned(lines: list[str], first: int, key: str) -> int | None:
    """The line of `key = ...` before the next table."""
    for n in range(first, len(lines)):
        if re.match(r"\s*\[", lines[n]):
            return None
        if re.match(rf"\s*{re.escape(key)}\s*[=.]", lines[n]):
            return n + 1
    return None
