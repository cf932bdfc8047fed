"""A first recipe, made from the defaults: what must be said is said, the rest stands in comments with its meaning."""

from __future__ import annotations

import textwrap
from typing import Any, get_origin

import attrs

from clt_plugins.cli.listing import ENGINE_TABLES, field_docs, stated_default, summary
from clt_plugins.contract.hooks import SLOTS
from clt_plugins.contract.spec import Spec
from clt_plugins.recipe.read import AUTO_KERNELS, Recipe, plain
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
            # A table whose presence is the choice stands in a comment as a whole.
            bracket = f"# [{a.name}]" if "example" in a.metadata else f"[{a.name}]"
            tables.append("\n".join([*_comment(docs[a.name]), bracket, *_settings(ENGINE_TABLES[a.name])]))
        elif a.name in SLOTS.values():
            tables += _choices(a, docs[a.name], plugins)
        else:
            parts.append("\n".join(_setting(a, docs[a.name])))
    return "\n\n".join(["\n".join(parts), *tables]) + "\n"


def _choices(a: Any, doc: str, plugins: Plugins) -> list[str]:
    """One table, or one for each choice in a list."""
    known = list(plugins.choices(a.name))
    wanted = a.metadata.get("default", a.metadata.get("example"))
    names = wanted if isinstance(wanted, list) else [wanted]
    brackets = f"[[{a.name}]]" if get_origin(a.type) is list else f"[{a.name}]"
    intro = _comment(f"{doc} One of: {', '.join(known)}." if known else doc)
    if not names:
        return ["\n".join([*intro, f"# {brackets}", '# name = ""'])]
    made = []
    for name in names:
        spec = _spec(a.name, name, plugins)
        described = [*intro, *_comment(f"{name}: {summary(spec.config)}")]
        made.append("\n".join([*described, brackets, f"name = {inline(name)}", *_settings(spec.config)]))
        intro = []
    return made


def _spec(slot: str, name: str, plugins: Plugins) -> Spec:
    if slot == "kernels" and name == AUTO_KERNELS.name:
        return AUTO_KERNELS
    return plugins.pick(slot, name).spec


def _settings(cls: Any) -> list[str]:
    docs = field_docs(cls)
    return [line for a in attrs.fields(cls) for line in _setting(a, docs.get(a.name, ""))]


def _setting(a: Any, doc: str) -> list[str]:
    default = stated_default(a)
    if default is attrs.NOTHING:
        return [*_comment(doc), f"{a.alias} = {inline(a.metadata.get('example', ''))}"]
    value = "" if default is None else inline(plain(default))
    return [*_comment(doc), f"# {a.alias} = {value}".rstrip()]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
