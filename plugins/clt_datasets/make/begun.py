"""What a generation was begun with, kept in the data set's folder: the plan, and what the rows are made from.

A generation is continued only with the same settings and the same content. Where the source tells its content
(`Identified`), content counts and not spelling: a model may have been moved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_datasets.format.files import naming, write_file
from clt_datasets.make.plan import Plan
from clt_plugins import Lock, Refused, load_json

if TYPE_CHECKING:
    from clt_plugins import Recipe

BEGUN = ".generate.json"
"""The plan as JSON, and `data`: what the source is made from, by setting."""
FOLDER_LOCK = ".generate.lock"
"""Held while one process decides for all: at the beginning, and when the data set is completed."""
CONTENT = "data"
TABLES = ("model", "source")
"""Fields of a plan that are tables of the recipe."""


@contextmanager
def one_process(folder: Path, rank: int) -> Iterator[None]:
    """Hold a rank's lock on a folder, which is made if it is not there.

    Raises:
        Refused: another process writes this rank's share.
        OSError: the folder cannot be made, or the lock; names it.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / f".generate_{rank}.lock")
    holder = lock.try_acquire()
    if holder is not None:
        raise Refused(folder, f"another `generate` writes into it ({holder}): wait until it has ended, or stop it")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def decides(folder: Path) -> Iterator[None]:
    """Wait until no other process decides about a folder, and keep others from it."""
    lock = Lock(folder / FOLDER_LOCK)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_folder(out: Path, plan: Plan, recipe: Recipe) -> None:
    """Refuse, before anything is loaded, a folder that cannot be used.

    Raises:
        Refused: it holds something else than an unfinished data set, or one with other settings.
    """
    if (out / BEGUN).exists():
        _compare_settings(out, _read(out / BEGUN), plan, recipe)
    elif out.exists() and (not out.is_dir() or any(path for path in out.iterdir() if not path.name.startswith("."))):
        raise Refused(out, "already there, and not an unfinished data set: give another folder with --out")


def begin(out: Path, plan: Plan, recipe: Recipe, content: Mapping[str, str]) -> None:
    """Record what a generation is begun with, or compare it.

    Args:
        content: what the source's data are made from, by setting.

    Raises:
        Refused: it was begun with other settings or other data.
    """
    with decides(out):
        check_folder(out, plan, recipe)
        path = out / BEGUN
        if path.exists():
            before = _read(path)
            recorded = before.get(CONTENT) or {}
            for setting, value in recorded.items():
                if setting in content and content[setting] != value:
                    raise Refused(
                        setting,
                        f"its content is not the one that {out} was begun with: it was {value}, now it is "
                        f"{content[setting]}; restore it, or give another folder with --out",
                    )
            if recorded or not content:
                return
        write_file(path, json.dumps({**_as_json(plan), CONTENT: dict(content)}).encode())


def _read(path: Path) -> dict[str, Any]:
    before = load_json(path)
    if not isinstance(before, dict) or not isinstance(before.get(CONTENT, {}), dict):
        raise Refused(path, "damaged: not a JSON object; give another folder with --out")
    return before


def _compare_settings(out: Path, before: dict[str, Any], plan: Plan, recipe: Recipe) -> None:
    """Refuse another plan."""
    tables = {"model": recipe.model, "source": recipe.source.config}
    covered = before.get(CONTENT, {})
    old, new = _flat(before), _flat(_as_json(plan))
    for name, value in new.items():
        table, _, key = name.partition(".")
        if name in covered or old.get(name) == value:
            continue
        if key and tables[table] is not None:
            setting = attrs.fields_dict(type(tables[table])).get(key)
            if setting is not None and (setting.metadata.get("free_on_resume") or _is_new(name, old, value, setting)):
                continue
        raise Refused(
            out,
            f"begun with other settings: {name} was {old.get(name)}, now it is {value}; give another folder with --out",
        )


def _is_new(name: str, old: Mapping[str, Any], value: Any, setting: attrs.Attribute[Any]) -> bool:
    """Whether a setting that the plan does not have yet has its default: a newer version of a plugin may add one."""
    return name not in old and setting.default is not attrs.NOTHING and setting.default == value


def _as_json(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(attrs.asdict(plan)))


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's settings; those of the recipe's tables by their path."""
    flat: dict[str, Any] = {}
    for name, value in plan.items():
        if name in TABLES and isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name != CONTENT:
            flat[name] = value
    return flat
