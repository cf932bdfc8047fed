"""In which settings a recipe differs from one that was stored as plain data: values are compared, not spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.spec import Selected
from clt_plugins.contract.types import recipe_key
from clt_plugins.recipe.structure import plain

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe

FREE_TABLES = {"name", "requires", "metrics", "loggers", "parallel", "kernels", "stages"}
"""Where the run is computed, what is watched, and what comes after it."""

LR = "train.lr"
FREE_RATES = {LR, "train.clip_norm"}
"""Rates that are changed on purpose in the middle of a run; the run's history has them. An optimizer marks its own as
`FREE_ON_RESUME`."""

STEPS = "train.steps"
SCHEDULE = "train.schedule_steps"
"""The steps that schedules go by; if not given, those of the run."""


@attrs.frozen(kw_only=True)
class Change:
    """A setting that is not what it was."""

    setting: str
    """Its path."""
    before: Any
    """Its value in the checkpoint's recipe, as plain data; None if it had none."""
    now: Any
    """Its value now."""
    free: bool
    """Whether it may differ, by what the setting is."""
    derived: bool
    """Whether the new value is only the default that follows from other settings."""


def changes(before: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """All settings that differ from those of a recipe as plain data; neither a new setting that has its default, nor
    one that is gone, counts."""
    return list(_in_record(before, recipe, "", False))


def _in_record(before: Any, record: Any, path: str, free: bool) -> Iterator[Change]:
    known = before if isinstance(before, Mapping) else {}
    for a in attrs.fields(type(record)):
        if not a.init:
            continue
        setting = f"{path}.{recipe_key(a)}" if path else recipe_key(a)
        is_free = (
            free or bool(a.metadata.get("free_on_resume")) or setting in {STEPS, SCHEDULE, *FREE_TABLES, *FREE_RATES}
        )
        value, old = getattr(record, a.name), known.get(recipe_key(a))
        default = _default(a, record)
        if old is None and _is_default(value, default):
            continue
        # Of tables only: items of lists have no default that follows from others.
        derived = _follows(a) and value == default and path != "" and not set(path) & set(".[")
        yield from _in_value(old, value, setting, is_free, derived)


def _in_value(old: Any, value: Any, setting: str, free: bool, derived: bool) -> Iterator[Change]:
    inside = isinstance(value, list) and value and all(_has_settings(item) for item in value)
    if isinstance(value, Selected) and isinstance(old, Mapping) and _is_named(value, old):
        yield from _in_record(old, value.config, setting, free)
    elif attrs.has(type(value)) and not isinstance(value, Selected) and isinstance(old, Mapping):
        yield from _in_record(old, value, setting, free)
    elif inside and isinstance(old, list) and len(old) == len(value):
        for index, item in enumerate(value):
            yield from _in_value(old[index], item, f"{setting}[{index}]", free, False)
    elif plain(value) != old:
        if isinstance(value, Selected) and isinstance(old, Mapping):  # other settings cannot be compared
            setting, old, value = f"{setting}.name", old.get("name"), value.name
        yield Change(setting=setting, before=old, now=plain(value), free=free, derived=derived)


def _follows(a: attrs.Attribute[Any]) -> bool:
    return isinstance(a.default, attrs.Factory) and a.default.takes_self  # type: ignore[arg-type, union-attr]


def _has_settings(value: Any) -> bool:
    return attrs.has(type(value))


def _is_default(value: Any, default: Any) -> bool:
    """Whether a value is the default; that of a choice is as a recipe writes it, by name or as a table."""
    if isinstance(value, list) and isinstance(default, list):
        return len(value) == len(default) and all(map(_is_default, value, default))
    if not isinstance(value, Selected):
        return bool(plain(value) == plain(default))
    stated = {"name": default} if isinstance(default, str) else default
    if not isinstance(stated, Mapping) or not _is_named(value, stated):
        return False
    fields = [a for a in attrs.fields(type(value.config)) if a.init]
    return all(
        _is_default(getattr(value.config, a.name), stated.get(recipe_key(a), _default(a, value.config))) for a in fields
    )


def _is_named(value: Selected, stated: Mapping[str, Any]) -> bool:
    """Whether a table names that choice, perhaps by an older name."""
    return stated.get("name") in (value.name, *value.spec.aliases)


def _default(a: attrs.Attribute[Any], record: Any) -> Any:
    if a.default is attrs.NOTHING:
        return a.metadata.get("default")
    if isinstance(a.default, attrs.Factory):  # type: ignore[arg-type]
        return a.default.factory(record) if a.default.takes_self else a.default.factory()  # type: ignore[union-attr]
    return a.default
