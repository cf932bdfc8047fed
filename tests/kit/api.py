"""Every public name with its signature, a line each: `python -m tests.kit.api` writes them to `api.txt`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click

import clt_plugins
from clt_plugins import testing
from clt_plugins.contract.hooks import Hooks

FILE = Path(__file__).with_name("api.txt")


def members(prefix: str, cls: type) -> Iterator[tuple[str, Any]]:
    """A class and its public methods, properties and fields."""
    yield prefix, cls
    if attrs.has(cls):
        for a in attrs.fields(cls):
            # As written: attrs replaces a field's type once somebody resolves it.
            written = inspect.get_annotations(cls).get(a.name, a.type)
            yield f"{prefix}.{a.alias}", f"{written}" + ("" if a.default is attrs.NOTHING else " = ...")
    else:
        yield from ((f"{prefix}.{name}", tp) for name, tp in inspect.get_annotations(cls).items() if name[0] != "_")
    fields = {a.name for a in attrs.fields(cls)} if attrs.has(cls) else set()
    for name, value in _own_and_from_parts(cls).items():
        if (name[0] != "_" or name == "__call__") and name not in fields:
            inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            inner = inner.fget if isinstance(inner, property) else getattr(inner, "func", inner)
            if inspect.isfunction(inner):
                yield f"{prefix}.{name}", inner


def _own_and_from_parts(cls: type) -> dict[str, Any]:
    """What a class has itself, and what it has of bases that are not public: they are parts of it."""
    parts = [base for base in cls.__mro__[1:] if base.__module__.startswith("clt_plugins.")]
    hidden = [base for base in parts if base.__name__ not in clt_plugins.__all__]
    return {name: value for base in (*reversed(hidden), cls) for name, value in vars(base).items()}


def everything() -> Iterator[tuple[str, Any]]:
    for name in clt_plugins.__all__:
        value = getattr(clt_plugins, name)
        if inspect.isclass(value):
            yield from members(name, value)
        else:
            yield name, value
    for name, hook in vars(Hooks).items():
        if name.startswith("clt_"):
            yield f"hook {name}", hook
    for name in testing.__all__:
        value = getattr(testing, name)
        yield from members(f"testing.{name}", value) if inspect.isclass(value) else [(f"testing.{name}", value)]


def described() -> list[str]:
    """Sorted lines."""
    lines = []
    for name, value in everything():
        if inspect.isfunction(value):
            lines.append(f"{name}{inspect.signature(value)}")
        elif inspect.isclass(value):
            lines.append(f"class {name}")
        elif name == "API_VERSION":
            lines.append(f"{name} = {value}")
        elif name == "testing.CHECKS":
            lines += [f"testing check {table}/{check}" for table, checks in value.items() for check in checks]
        else:
            lines.append(f"{name}: {value}" if isinstance(value, str) and name != "__version__" else name)
    return sorted(lines)


def untyped() -> list[str]:
    """Public functions with a parameter or result without a type."""
    faults = []
    for name, value in everything():
        if not inspect.isfunction(value) or isinstance(value, click.Command):
            continue
        signature = inspect.signature(value)
        empty = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty and value.__name__ != "__init__":
            empty.append("return")
        faults += [f"{name}: {each}" for each in empty]
    return faults


if __name__ == "__main__":
    FILE.write_text("\n".join(described()) + "\n")
