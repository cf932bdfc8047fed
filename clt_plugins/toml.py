"""Plain data -> TOML text. (The standard library only reads it.)

Data are tables (dict), lists, strings, booleans, integers and floats; TOML has no null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any


def inline(value: Any) -> str:
    """A value on one line, as TOML writes it; what TOML cannot hold comes out as Python shows it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for one control character that JSON lets pass.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key(str(k))} = {inline(v)}" for k, v in value.items()) + "}"
    return repr(value)


def key(name: str) -> str:
    """A key, quoted where it must be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else inline(name)


def toml_text(table: Mapping[str, Any]) -> str:
    """A whole file: plain values first, then a table for each dict and for each item of a list of dicts."""
    return "\n".join(_lines(table, "")).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: str) -> list[str]:
    lines, later = [], []
    for name, value in table.items():
        below = f"{path}.{key(name)}" if path else key(name)
        if isinstance(value, Mapping):
            later += ["", f"[{below}]", *_lines(value, below)]
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                later += ["", f"[[{below}]]", *_lines(item, below)]
        else:
            lines.append(f"{key(name)} = {inline(value)}")
    return lines + later
