"""TOML data -> typed configs, strictly: every fault found, each named by its dotted path.

cattrs picks the hook for a type; the hooks are ours, since its own turn `"5"`, `2.7` and `true` into numbers.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import attrs

from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.spec import Choice, Selected
from clt_plugins.contract.types import HubOrPath, describe, is_choice, is_union, recipe_key
from clt_plugins.errors import Fault, Faults, did_you_mean, fault
from clt_plugins.toml import inline

if TYPE_CHECKING:
    import cattrs

    from clt_plugins.registry.plugins import Plugins

Pick = Callable[[str, str], Choice]
"""(slot, name) -> the choice; raises `Faults` with the reason."""


def converter(
    pick: Pick, folder: Path | None = None, place: Callable[[str, Any], str] = lambda key, cls: ""
) -> cattrs.Converter:
    """A strict reader of plain data.

    Args:
        pick: finds the choice that a table names.
        folder: where relative paths are looked for first.
        place: says of a key that a class does not have where it belongs; "" if that is not known.
    """
    import cattrs  # not needed for `--help`, which should be quick

    reader = cattrs.Converter(detailed_validation=False)
    for kind in (bool, int, float, str):
        reader.register_structure_hook(kind, _scalar)
    reader.register_structure_hook(Path, lambda value, _: _path(value, folder))
    hooks: list[tuple[Callable[[Any], bool], Callable[[Any, Any], Any]]] = [
        (lambda t: t is HubOrPath, lambda value, _: _hub_or_path(value, folder)),
        (lambda t: get_origin(t) is Literal, _literal),
        (is_union, lambda value, t: _union(value, t, reader)),
        (lambda t: get_origin(t) is list, lambda value, t: _list(value, t, reader)),
        (lambda t: get_origin(t) is dict, lambda value, t: _dict(value, t, reader)),
        (lambda t: attrs.has(t), lambda value, t: _record(value, t, reader, place)),
        (is_choice, lambda value, t: _choice(value, get_args(t)[1], reader, pick)),
    ]
    for applies, hook in hooks:
        reader.register_structure_hook_func(applies, hook)
    return reader


def structure_choice(plugins: Plugins, slot: str, value: Any, where: str = "") -> Selected:
    """A choice from plain data, `{"name": ..., ...}` or its bare name.

    Args:
        where: the origin that faults name, such as a file.

    Raises:
        Faults: all of them.
    """
    faults: list[Fault] = []
    with _under(faults, slot):
        return _choice(value, slot, converter(plugins.pick), plugins.pick)
    raise Faults(attrs.evolve(one, origin=where) for one in faults)


@contextmanager
def _under(faults: list[Fault], part: str | int) -> Iterator[None]:
    """Collect the faults found inside, with `part` put before their paths."""
    try:
        yield
    except Faults as error:
        faults += [attrs.evolve(fault, where=(part, *fault.where)) for fault in error.faults]


def _scalar(value: Any, kind: Any) -> Any:
    if type(value) is float and not math.isfinite(value):
        raise fault(f"must be finite: {inline(value)}")
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise fault(f"too large for a float: {value}") from None
    small = ", in small letters" if kind is bool and str(value).lower() in ("true", "false") else ""
    raise fault(f"expected {describe(kind)}{small}, got {inline(value)}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise fault(f"expected {what}, got {inline(value)}")
    return value


def _on_disk(text: str, folder: Path | None) -> Path | None:
    """The file or folder of that name beside the recipe, else in the working directory, as an absolute path."""
    for base in (folder, Path()):
        if base is not None and (base / Path(text).expanduser()).exists():
            return (base / Path(text).expanduser()).resolve()
    return None


def _path(value: Any, folder: Path | None) -> Path:
    if isinstance(value, Path):
        return value
    text = _text(value, "a path")
    return _on_disk(text, folder) or Path(text).expanduser()


def _hub_or_path(value: Any, folder: Path | None) -> str:
    text = _text(str(value) if isinstance(value, Path) else value, "a hub id or a path")
    return str(_on_disk(text, folder) or text)


def _literal(value: Any, tp: Any) -> Any:
    options = get_args(tp)
    for option in options:
        if type(value) is type(option) and value == option:
            return option
    near = did_you_mean(value, (o for o in options if isinstance(o, str)), '"') if isinstance(value, str) else ""
    raise fault(f"expected {describe(tp)}, got {inline(value)}{near}")


def _union(value: Any, tp: Any, reader: cattrs.Converter) -> Any:
    members = [member for member in get_args(tp) if member is not type(None)]
    if value is None and len(members) < len(get_args(tp)):
        return None
    if type(value) in members:  # an int stays one in `float | int`
        return reader.structure(value, type(value))
    for member in members:
        try:
            return reader.structure(value, member)
        except Faults as error:
            # A fault inside the value (`layers[1]`) says more than that no member fits; so does the only member's.
            if len(members) == 1 or any(fault.where for fault in error.faults):
                raise
    options = [o for member in members if get_origin(member) is Literal for o in get_args(member)]
    near = did_you_mean(value, (o for o in options if isinstance(o, str)), '"') if isinstance(value, str) else ""
    raise fault(f"expected {describe(tp)}, got {inline(value)}{near}")


def _list(value: Any, tp: Any, reader: cattrs.Converter) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise fault(f"expected {describe(tp)}, got {inline(value)}")
    items: list[Any] = []
    faults: list[Fault] = []
    for index, item in enumerate(value):
        with _under(faults, index):
            items.append(reader.structure(item, get_args(tp)[0]))
    if faults:
        raise Faults(faults)
    return items


def _dict(value: Any, tp: Any, reader: cattrs.Converter) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise fault(f"expected {describe(tp)}, got {inline(value)}")
    items: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, item in value.items():
        with _under(faults, name):
            items[name] = reader.structure(item, get_args(tp)[1])
    if faults:
        raise Faults(faults)
    return items


def _choice(value: Any, slot: str, reader: cattrs.Converter, pick: Pick) -> Selected:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise fault(f"expected a table with a name, got {inline(value)}")
    if value.get("name") is None:
        raise fault("required, but missing", "name")
    if not isinstance(value["name"], str):
        raise fault(f"expected str, got {inline(value['name'])}", "name")
    try:
        choice = pick(slot, value["name"])
    except Faults as error:
        raise fault(str(error)) from error
    settings = {key: item for key, item in value.items() if key != "name"}
    return Selected(choice, reader.structure(settings, choice.spec.config))


def _record(value: Any, cls: Any, reader: cattrs.Converter, place: Callable[[str, Any], str]) -> Any:
    """An attrs class from a table. None means "not given": TOML has no such value, a dictionary may."""
    if not isinstance(value, Mapping):
        raise fault(f"expected a table, got {inline(value)}")
    attrs.resolve_types(cls)
    fields = {recipe_key(a): a for a in attrs.fields(cls) if a.init}
    raw = {key: item for key, item in value.items() if item is not None}
    for key, a in fields.items():
        if key not in raw and "default" in a.metadata:  # `default_choice`: written as in a recipe
            raw[key] = copy.deepcopy(a.metadata["default"])
    typed: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, item in raw.items():
        with _under(faults, key):
            if key not in fields:
                raise fault(f"unknown key{place(key, cls) or did_you_mean(key, fields) or _known(fields)}")
            if cls is Recipe and (wrong := _brackets(key, item, fields[key].type)):
                raise fault(wrong)
            typed[key] = reader.structure(item, fields[key].type)
    required = [key for key, a in fields.items() if a.default is attrs.NOTHING]
    faults += [Fault((key,), "required, but missing") for key in required if key not in raw]
    if not faults:
        try:
            return cls(**{fields[name].alias: item for name, item in typed.items()})
        except Faults:
            raise  # `Refused`, by a check of the class as a whole
        except (ValueError, TypeError) as error:
            raise Faults(_invalid(cls, typed) or [Fault((), _plain_text(error, ""))]) from error
    raise Faults(faults + _invalid(cls, typed))


def _brackets(key: str, value: Any, tp: Any) -> str:
    """What is wrong with the brackets of a recipe's table; "" if nothing is. (The head of an inner table has more in it
    than its key.)"""
    if get_origin(tp) is list and is_choice(get_args(tp)[0]) and isinstance(value, Mapping):
        return f"a recipe may have several: write [[{key}]], with two brackets"
    if is_choice(tp) and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return f"a recipe has one: write [{key}], with one bracket"
    return ""


def _known(fields: Iterable[str]) -> str:
    return f" (known: {', '.join(sorted(fields)) or 'none'})"


def _invalid(cls: Any, typed: dict[str, Any]) -> list[Fault]:
    """The faults that all validators find; attrs itself stops at the first."""
    # A stand-in for the object, which cannot be made: the values given and the plain defaults.
    values = {a.name: a.default for a in attrs.fields(cls) if not isinstance(a.default, attrs.Factory)}  # type: ignore[arg-type]
    values |= {a.name: typed[recipe_key(a)] for a in attrs.fields(cls) if recipe_key(a) in typed}
    draft = SimpleNamespace(**{name: value for name, value in values.items() if value is not attrs.NOTHING})
    faults = []
    for a in attrs.fields(cls):
        if a.validator is None or recipe_key(a) not in typed:
            continue
        try:
            a.validator(draft, a, typed[recipe_key(a)])
        except AttributeError:
            continue  # it compares with a field that has no value; that field has a fault of its own
        except (ValueError, TypeError) as error:
            faults.append(Fault((recipe_key(a),), _plain_text(error, a.name)))
    return faults


def _plain_text(error: Exception, name: str) -> str:
    """A validator's text, without the field's name in front: the path says it."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    text = re.sub(rf"^Length of '{name}'", "length", text)
    return re.sub(rf"^'{name}' ", "", text)


def plain(value: Any) -> Any:
    """Typed settings as plain TOML data: tables, lists and scalars, defaults included, None left out."""
    if isinstance(value, Selected):
        return {"name": value.name, **plain(value.config)}
    if attrs.has(type(value)):
        items = ((recipe_key(a), getattr(value, a.name)) for a in attrs.fields(type(value)) if a.init)
        return {key: plain(item) for key, item in items if item is not None}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
