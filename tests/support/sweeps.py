"""Small sweeps for tests, their members alone, and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_plugins import run
from clt_plugins.recipe.read import read_sweep
from tests.support.helpers import plugins, tables

TIMED = ("time/",)
"""Metrics that no two runs have in common."""


def many(swept: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    rare = {"checkpoint_every": 6, "log_every": 6, "eval_every": 6, **changes.pop("train", {})}
    changed = {"stages": [{"name": "evaluate", "tokens": 64}], "train": rare, **changes}
    return {**tables(**changed), "sweep": dict(swept)}


def assert_same_run(member: Path, alone: Path) -> None:
    """All files have the same bytes, but for when and by which command they were made, and seconds."""
    files = [
        {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (member, alone)
    ]
    # What an interruption has made stays: compare what both have to have.
    for one in files:
        for name in ("history.jsonl", "versions.json"):
            del one[name]
        for name in [name for name in one if name.endswith("metrics.jsonl")]:
            lines = [json.loads(line) for line in one[name].decode().splitlines()]
            one[name] = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]  # type: ignore
    assert files[0].keys() == files[1].keys()
    assert [name for name, content in files[0].items() if content != files[1][name]] == []


def alone(place: Path, swept: Mapping[str, Any], label: str) -> Path:
    """The run of a member, by itself."""
    member = next(one for one in read_sweep(swept, plugins=plugins()).members if one.label == label)
    run(member.recipe, out=place, plugins=plugins())
    return place
