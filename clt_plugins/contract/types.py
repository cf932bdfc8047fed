"""Which types a recipe can hold, and what they are called in messages."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Union, cast, get_args, get_origin

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Selected
from clt_plugins.errors import did_you_mean
from clt_plugins.toml import inline

HubOrPath = NewType("HubOrPath", str)
"""A folder or file where there is one of that name beside the recipe or in the working directory, else a hub id."""


def recipe_key(a: attrs.Attribute[Any]) -> str:
    """The name of a field in recipes: a field that would be a word of Python, such as `from_`, has a `_` more."""
    return (a.alias or a.name).removesuffix("_")


def is_union(tp: Any) -> bool:
    return get_origin(tp) in (Union, types.UnionType)


def is_choice(tp: Any) -> bool:
    return get_origin(tp) is Annotated and get_args(tp)[0] is Selected


def describe(tp: Any) -> str:
    """A type in a reader's words: `int or list of int`."""
    if get_origin(tp) is Literal:
        options = ", ".join(inline(option) for option in get_args(tp))
        return f"one of {options}" if len(get_args(tp)) > 1 else options
    if is_union(tp):
        return " or ".join(describe(member) for member in get_args(tp) if member is not type(None))
    if get_origin(tp) is list:
        return f"list of {describe(get_args(tp)[0])}"
    if get_origin(tp) is dict:
        return f"table of {describe(get_args(tp)[1])}"
    if is_choice(tp):
        return f"a choice for [{get_args(tp)[1]}]"
    if tp is Path:
        return "a path"
    if tp is HubOrPath:
        return "a hub id or a path"
    if tp is bool:
        return "true or false"
    return "a table" if attrs.has(tp) else getattr(tp, "__name__", str(tp))


def check_config(cls: Any) -> None:
    """Whether recipes can hold a config class.

    Raises:
        TypeError: no, saying what to change.
    """
    if not (isinstance(cls, type) and attrs.has(cls)):
        raise TypeError(f"config must be an attrs class (@attrs.frozen(kw_only=True)), got {cls!r}")
    if not attrs.inspect(cls).is_frozen:
        raise TypeError(f"{cls.__name__} must be frozen: @attrs.frozen(kw_only=True)")
    try:
        attrs.resolve_types(cls)
    except NameError as error:
        raise TypeError(
            f"{cls.__name__}: {error}: types of fields must be importable when the plugin loads, "
            "not under TYPE_CHECKING"
        ) from error
    names = {a.name for a in attrs.fields(cls)}
    for base in reversed(cls.__mro__):
        # What is a `ClassVar` has an annotation.
        known = names | vars(base).get("__annotations__", {}).keys()
        values = [name for name, value in vars(base).items() if name[0] != "_" and not _is_behaviour(value)]
        if attrs.has(base) and (no_field := [name for name in values if name not in known]):
            raise TypeError(
                f"{cls.__name__}.{no_field[0]}: has no type, so that no recipe can set it: "
                f"write `{no_field[0]}: float = ...`, or whatever it is"
            )
    for a in attrs.fields(cls):
        if recipe_key(a) == "name":
            raise TypeError(f"{cls.__name__}.name: a recipe's table says its choice there; call the field otherwise")
        if a.type is None:
            raise TypeError(f"{cls.__name__}.{a.name}: has no type")
        if not _is_supported(a.type):
            raise TypeError(
                f"{cls.__name__}.{a.name}: a recipe cannot hold {a.type}; use bool, int, float, str, Path, "
                'HubOrPath, Literal, Annotated[Selected, "table"], list, dict[str, ...], unions of them, or another '
                "such class"
            )
        for table in _tables(a.type):
            if table not in BY_TABLE:
                near = did_you_mean(table, BY_TABLE) or f" (known: {', '.join(BY_TABLE)})"
                raise TypeError(f"{cls.__name__}.{a.name}: no choices are made in a table {table!r}{near}")


def _is_behaviour(value: Any) -> bool:
    """Whether something in a class's body is no value: a method, a property, an inner class, a slot."""
    return inspect.isroutine(value) or inspect.isdatadescriptor(value) or isinstance(value, type | cached_property)


def _is_supported(tp: Any) -> bool:
    if tp in (bool, int, float, str, Path, HubOrPath) or get_origin(tp) is Literal or is_choice(tp):
        return True
    if is_union(tp):
        return all(member is type(None) or _is_supported(member) for member in get_args(tp))
    if get_origin(tp) is list:
        return _is_supported(get_args(tp)[0])
    if get_origin(tp) is dict:
        return get_args(tp)[0] is str and _is_supported(get_args(tp)[1])
    if attrs.has(tp) and tp is not Selected:
        attrs.resolve_types(tp)
        return all(a.type is not None and _is_supported(a.type) for a in attrs.fields(tp))
    return False


def _tables(tp: Any) -> list[Any]:
    """The tables whose choices a type holds."""
    if is_choice(tp):
        return [get_args(tp)[1]]
    if get_origin(tp) is Literal:
        return []
    return [table for member in get_args(tp) for table in _tables(member)]


def field_docs(cls: type) -> dict[str, str]:
    """The string literals under an attrs class's fields, its bases' included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not attrs.has(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue  # typed in at a prompt: there is no source to read
        body = cast("ast.ClassDef", ast.parse(source).body[0]).body
        for statement, after in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                docs[statement.target.id] = " ".join(after.value.value.split())
    return docs


def summary(cls: type) -> str:
    """The first paragraph of a config's own docstring. (attrs gives none of its own; bases are not asked.)"""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def type_text(tp: Any) -> str:
    """A type as it would be written: `int | list[int]`, `"global" | "layer"`, `choice for [schedule]`."""
    if is_choice(tp):
        return f"choice for [{get_args(tp)[1]}]"
    if get_origin(tp) is Literal:
        return " | ".join(inline(option) for option in get_args(tp))
    if get_origin(tp) in (list, dict):
        return f"{get_origin(tp).__name__}[{', '.join(map(type_text, get_args(tp)))}]"
    if get_origin(tp) is not None:
        return " | ".join(type_text(member) for member in get_args(tp) if member is not type(None))
    return "hub id or path" if tp is HubOrPath else getattr(tp, "__name__", str(tp))


def stated_default(a: Any) -> Any:
    """A field's default; None where none is stated because it goes by other fields, `attrs.NOTHING` if required. Of a
    choice it is as a recipe writes it (`default_choice`)."""
    if a.default is attrs.NOTHING and "default" in a.metadata:
        return a.metadata["default"]
    if not isinstance(a.default, attrs.Factory):  # type: ignore[arg-type]
        return a.default
    return None if a.default.takes_self else a.default.factory()
