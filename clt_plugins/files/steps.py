"""Folders named by steps, `step_000400`: which names are ours."""

from __future__ import annotations

from pathlib import Path


def step_folders(folder: Path) -> list[Path]:
    """The step folders in a folder, the earliest first; other names, such as a user's `step_best`, are left alone."""
    named = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted((path for path in named if path.name == step_name(step_of(path)) and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step of such a folder."""
    return int(path.name.removeprefix("step_"))


def step_name(step: int) -> str:
    """The name of the folder of a step."""
    return f"step_{step:06}"
