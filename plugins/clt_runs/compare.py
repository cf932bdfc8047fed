"""What two runs differ in: settings of their recipes, and results."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from clt_plugins import printable
from clt_runs.find import RunState

ABSENT = "-"


def compared(one: RunState, other: RunState, *, as_json: bool) -> str:
    """The differences, as text or as JSON: a table `recipe` and a table `results`, each with the values of both."""
    recipe = _differences(dict(flat(one.recipe)), dict(flat(other.recipe)))
    results = _differences(_results(one), _results(other))
    if as_json:
        record = {"runs": [one.name, other.name], "recipe": recipe, "results": results}
        # TOML has inf and nan, which are no JSON.
        return json.dumps(_finite(record), indent=2, allow_nan=False, default=str)
    head = [["", one.name, other.name]]
    lines = [*_table(head + [[key, *map(_text, values)] for key, values in recipe.items()])]
    if not recipe:
        lines.append("the recipes are the same")
    lines += ["", *_table([["results", "", ""]] + [[key, *map(_text, values)] for key, values in results.items()])]
    if not results:
        lines.append("the results are the same")
    lines += [printable(f"{run.name}: {fault}") for run in (one, other) for fault in run.faults]
    return "\n".join(lines)


def flat(table: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by key, as `--set` writes them: an item of a list by its name, `losses.mse.weight`.

    Of several items with one name, the second is `losses.mse[1].weight`.
    """
    if isinstance(table, Mapping):
        for key, value in table.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    elif isinstance(table, list) and table and all(isinstance(item, Mapping) for item in table):
        seen: Counter[str] = Counter()
        for number, item in enumerate(table):
            name = str(item.get("name", number))
            again = f"[{seen[name]}]" if seen[name] else ""
            seen[name] += 1
            yield from flat(item, f"{path}.{name}{again}")
    else:
        yield path, table


def _results(run: RunState) -> dict[str, Any]:
    own = {"status": run.status, "step": run.step, "tokens": run.tokens, "tokens_per_s": run.tokens_per_s}
    return {key: value for key, value in (own | run.results).items() if value is not None}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Both values of each key that differs; None where there is none."""
    keys = [*one, *(key for key in other if key not in one)]
    return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[number]) for row in rows) for number in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
