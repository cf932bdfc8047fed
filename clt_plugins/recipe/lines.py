"""Which line of a recipe's file a setting stands on."""

from __future__ import annotations

import re


def line_of(text: str, setting: str) -> int | None:
    """The line (from 1) of a setting such as `activation`, `losses[1]` or `losses[1].weight`, or of its table.

    None where the file does not say it: a default, or a `--set` flag.
    """
    table, index, key = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:\.(.*))?", setting).groups()  # type: ignore[union-attr]
    number = int(index) if index is not None else 0
    lines = text.splitlines()
    heads = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[?\s*{table}\s*\]\]?", line)]
    if len(heads) > number:
        if key is not None:
            for n in range(heads[number] + 1, len(lines)):
                if re.match(r"\s*\[", lines[n]):
                    break
                if re.match(rf"\s*{re.escape(key)}\s*=", lines[n]):
                    return n + 1
        return heads[number] + 1
    for n, line in enumerate(lines):
        if re.match(r"\s*\[", line):
            break
        if re.match(rf"\s*{table}\s*=", line):
            return n + 1
    return None
