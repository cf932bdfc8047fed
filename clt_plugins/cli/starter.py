"""A first recipe, made from the defaults: what must be said is said, the rest stands in comments with its meaning."""

from __future__ import annotations

import textwrap
from typing import Any

import attrs

from clt_plugins.cli.listing import ENGINE_TABLES
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import BY_TABLE, Slot
from clt_plugins.contract.types import field_docs, recipe_key, stated_default, summary
from clt_plugins.recipe.structure import plain
from clt_plugins.registry.plugins import Plugins
from clt_plugins.toml import inline

HEADER = """\
# A recipe for `python -m clt_plugins run`. What stands in a comment is the default, or may be left out.
# `python -m clt_plugins plugins` lists all choices with their settings.
"""


def starter(plugins: Plugins) -> str:
    """A recipe that is valid where the built-in plugins are loaded."""
    attrs.resolve_types(Recipe)
    docs = field_docs(Recipe)
    parts, tables = [HEADER], []
    for a in attrs.fields(Recipe):
        if a.name in ENGINE_TABLES:
            tables.append("\n".join([*_comment(docs[a.name]), f"[{a.name}]", *_settings(ENGINE_TABLES[a.name])]))
        elif a.name in BY_TABLE:
            tables += _choices(BY_TABLE[a.name], plugins)
        else:
            parts.append("\n".join(_setting(a, docs[a.name])))
    return "\n\n".join(["\n".join(parts), *tables]) + "\n"


def _choices(slot: Slot, plugins: Plugins) -> list[str]:
    """One table, or one for each choice in a list."""
    known = list(plugins.choices(slot.table))
    stated = slot.example if slot.default is None else slot.default
    names = stated if isinstance(stated, list) else [stated or ""]
    intro = _comment(f"{slot.doc} One of: {', '.join(known)}." if known else slot.doc)
    if not names:
        return ["\n".join([*intro, f"# {slot.bracket}", '# name = ""'])]
    tables = []
    for name in names:
        spec = plugins.pick(slot.table, name).spec
        described = [*intro, *_comment(f"{name}: {summary(spec.config)}")]
        tables.append("\n".join([*described, slot.bracket, f"name = {inline(name)}", *_settings(spec.config)]))
        intro = []
    return tables


def _settings(cls: Any) -> list[str]:
    docs = field_docs(cls)
    return [line for a in attrs.fields(cls) for line in _setting(a, docs.get(a.name, ""))]


def _setting(a: Any, doc: str) -> list[str]:
    default = stated_default(a)
    if default is attrs.NOTHING:
        return [*_comment(doc), f"{recipe_key(a)} = {inline(a.metadata.get('example', ''))}"]
    value = "" if default is None else inline(plain(default))
    return [*_comment(doc), f"# {recipe_key(a)} = {value}".rstrip()]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
