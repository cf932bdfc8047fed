"""A recipe's way: TOML -> defaults -> `--set` -> typed settings -> checks across tables.

tomllib                    the file as plain tables (`_read_toml`)
contract/slots             defaults of tables that the file does not name
recipe/overrides           `--set train.steps=100`, put into the plain tables
recipe/sweep               of a recipe for many transcoders: one recipe for each
recipe/moved               settings that have moved: refused, with what to write
recipe/places              where a setting belongs that stands in the wrong table
recipe/structure           plain tables -> attrs classes by cattrs, strictly; all faults at once
registry/plugins           a table's `name` -> the choice of a plugin, whose config class types the rest
clt_check                  complaints that no single field shows
model/assemble             typed recipe -> built objects (registry/build: build, wrap, check)
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import attrs

from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import BY_TABLE, OF_RECIPE, Slot
from clt_plugins.contract.types import is_choice, recipe_key
from clt_plugins.errors import Fault, Faults, Refused
from clt_plugins.recipe import sweep
from clt_plugins.recipe.lines import line_of
from clt_plugins.recipe.moved import move
from clt_plugins.recipe.overrides import Overrides
from clt_plugins.recipe.places import place
from clt_plugins.recipe.structure import converter, plain
from clt_plugins.toml import toml_text

if TYPE_CHECKING:
    from clt_plugins.contract.spec import Selected
    from clt_plugins.recipe.sweep import Sweep
    from clt_plugins.registry.plugins import Plugins


def read_recipe(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> Recipe:
    """Read a recipe and check all that can be checked without building anything.

    Args:
        recipe: a file, or its tables as a dictionary (where None means "not given").
        overrides: `--set` flags, `KEY=VALUE` each.
        plugins: what choices there are; freshly loaded if not given.

    Raises:
        Faults: all of them, each with file and line, or with the flag.
        PluginError: a plugin's own check is broken.
    """
    if plugins is None:
        from clt_plugins.registry.plugins import load_plugins

        plugins = load_plugins()
    table, file, folder = _tables(recipe)
    return _typed(table, file, folder, overrides, plugins)


def read_sweep(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> Sweep | None:
    """Read a recipe with `[sweep]`, and all recipes that it stands for; None if it has no such table.

    Args:
        recipe, overrides, plugins: see `read_recipe`.

    Raises:
        Faults: all of them, each with file and line, or with the flag.
        PluginError: a plugin's own check is broken.
    """
    if plugins is None:
        from clt_plugins.registry.plugins import load_plugins

        plugins = load_plugins()
    table, file, folder = _tables(recipe)
    flags = Overrides(overrides)
    faults = _changed(table, flags)
    if sweep.TABLE not in table:
        return None
    if faults:
        raise Faults(faults)
    stated = table.pop(sweep.TABLE)

    def typed(changed: dict[str, Any]) -> Recipe:
        found, wrong = _structured(changed, file, folder, plugins)
        if found is None or wrong:
            raise Faults(wrong)
        return found

    try:
        keys, members = sweep.members(stated, table, typed)
    except Faults as error:
        raise Faults([locate(flags.locate(fault), file) for fault in error.faults]) from error
    return sweep.Sweep(keys=keys, members=members)


def _tables(recipe: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path | None]:
    """The recipe as plain tables, what faults name, and what relative paths in it start from."""
    if isinstance(recipe, Mapping):
        return copy.deepcopy(dict(recipe)), "recipe", None
    return _read_toml(Path(recipe)), str(recipe), Path(recipe).parent


def _changed(table: dict[str, Any], flags: Overrides) -> list[Fault]:
    """Put defaults of choices and `--set` flags into plain tables; returns the faults of the flags."""
    for slot in OF_RECIPE:
        if slot.default is not None and table.get(slot.table) is None:
            table[slot.table] = copy.deepcopy(slot.default)
    return flags.apply(table)


def _structured(
    table: dict[str, Any], file: str, folder: Path | None, plugins: Plugins, *, check: bool = True
) -> tuple[Recipe | None, list[Fault]]:
    """The recipe in plain tables, which are changed; and all that is wrong with it.

    Args:
        check: ask plugins too, if nothing else is wrong.
    """
    typed = None
    faults = move(table, _text(file))
    try:
        known = partial(place, table, plugins.pick)
        typed = converter(plugins.pick, folder, known).structure(table, Recipe)
    except Faults as error:
        faults += error.faults
    faults += _missing_distributions(table.get("requires"))
    if check and typed is not None and not faults:
        faults = plugins.checks(typed)
    return typed, faults


def _typed(table: dict[str, Any], file: str, folder: Path | None, overrides: Sequence[str], plugins: Plugins) -> Recipe:
    """The recipe in plain tables, which are changed; see `read_recipe`.

    Args:
        file: what faults name.
        folder: what relative paths in it start from.
    """
    flags = Overrides(overrides)
    faults = _changed(table, flags)
    if sweep.TABLE in table:
        text = "this recipe is one for many transcoders: `sweep RECIPE --out DIR` trains them"
        raise Faults([locate(flags.locate(Fault((sweep.TABLE,), text)), file)])
    typed, in_tables = _structured(table, file, folder, plugins, check=not faults)
    faults += [locate(flags.locate(fault), file) for fault in in_tables]
    if typed is None or faults:
        raise Faults(faults)
    return typed


def read_usable_recipe(file: Path, overrides: Sequence[str], plugins: Plugins) -> tuple[Recipe, list[str]]:
    """The recipe of a run that is over, without what nothing is left to do for.

    `requires` was only for training and is left out. Choices of plugins that are not installed, and those that hold
    such, are replaced by their defaults, or left out of a list. The source and the transforms are
    needed in any case.

    Returns:
        The recipe, and a text for each logger that is left out.

    Raises:
        Faults: see `read_recipe`.
    """
    table = _read_toml(file)
    move(table)  # the run may be older
    missing = []
    for slot in OF_RECIPE:
        chosen = table.get(slot.table)
        if slot.table in ("source", "transforms") or chosen is None:
            continue
        if not slot.many:
            if not _is_installed(chosen, slot, plugins):
                del table[slot.table]
        elif isinstance(chosen, list):
            left = [one for one in chosen if _is_installed(one, slot, plugins)]
            if slot.table == "loggers":
                missing += [f"logger {_name(one)!r} is of no installed plugin" for one in chosen if one not in left]
            table[slot.table] = left
            if not left and slot.needs_one:
                del table[slot.table]
    table.pop("requires", None)
    return _typed(table, str(file), file.parent, overrides, plugins), missing


def _name(chosen: Any) -> Any:
    """The name in a choice's table, or the choice as a recipe may write it, by name alone."""
    return chosen.get("name") if isinstance(chosen, Mapping) else chosen


def _is_installed(chosen: Any, slot: Slot, plugins: Plugins) -> bool:
    """Whether plugins offer a choice, and those that its settings name; what is no name is for `_typed` to complain
    of."""
    name = _name(chosen)
    if not isinstance(name, str):
        return True
    try:
        config: Any = plugins.pick(slot.table, name).spec.config
    except Faults:
        return False
    inside = chosen if isinstance(chosen, Mapping) else {}
    attrs.resolve_types(config)
    return all(
        _is_installed(inside[recipe_key(a)], BY_TABLE[get_args(a.type)[1]], plugins)
        for a in attrs.fields(config)
        if is_choice(a.type) and recipe_key(a) in inside
    )


def locate(fault: Fault, file: str) -> Fault:
    """A fault with file and line as its origin, if it has none yet.

    Args:
        file: the recipe's; a recipe that is no file is called "recipe" and has no lines.
    """
    if fault.origin:
        return fault
    line = line_of(_text(file), fault.where) if fault.where else None
    return attrs.evolve(fault, origin=f"{file}:{line}" if line else file)


def _text(file: str) -> str:
    """A recipe's file; "" for a recipe that is none."""
    path = Path(file)
    return path.read_text(encoding="utf-8-sig") if path.is_file() else ""


def _read_toml(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise Refused(path, "not a file")  # a device may have no end, a pipe no writer
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors put a byte-order mark first
    except FileNotFoundError:
        raise Refused(path, "no such file") from None
    except OSError as error:
        raise Refused(path, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(path, f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        text = str(error)
        remedy = ": text stands in quotes, true and false in small letters" if text.startswith("Invalid value") else ""
        raise Refused(path, text + remedy) from error


def _missing_distributions(requires: Any) -> list[Fault]:
    """What of `requires` is not installed, or not in that version."""
    if not requires or not isinstance(requires, list):
        return []
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import InvalidRequirement, Requirement

    faults = []
    for index, text in enumerate(requires):
        if not isinstance(text, str):
            continue  # the type's own fault is reported
        where = ("requires", index)
        try:
            required = Requirement(text)
            installed = version(required.name)
        except InvalidRequirement:
            faults.append(Fault(where, f'expected a requirement such as "clt-gated>=1.0", got "{text}"'))
        except PackageNotFoundError:
            faults.append(Fault(where, f"{text} is not installed: pip install '{text}'"))
        else:
            if not required.specifier.contains(installed, prereleases=True):
                faults.append(Fault(where, f"{text} is needed, but {required.name} {installed} is installed"))
    return faults


def recipe_data(recipe: Recipe | Selected) -> dict[str, Any]:
    """The resolved recipe as plain data; `read_recipe` makes the same recipe of it. Of a choice, its table."""
    return plain(recipe)


def as_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, every default written out; `read_recipe` makes the same recipe of it."""
    return toml_text(recipe_data(recipe))
