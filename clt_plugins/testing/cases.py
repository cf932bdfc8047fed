"""The cases of a plugin: one for each choice and check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.errors import Faults, Refused, did_you_mean
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.by_name import imported, module_name
from clt_plugins.registry.info import Info
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.testing.case import Case, Outcome
from clt_plugins.testing.registry import PLUGIN, checks_of
from clt_plugins.testing.report import Nonconformance

Settings = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""Choice -> its settings, or several of them."""


def cases(
    plugin: str | ModuleType | Any, *, settings: Settings | None = None, recipe: Mapping[str, Any] | None = None
) -> list[Case]:
    """All cases of a plugin.

    Some checks start processes, which import the main script: a script that runs cases outside of pytest needs
    `if __name__ == "__main__":`.

    Args:
        plugin: the name of an installed plugin or distribution, or a module: its name, its file, or itself.
        settings: choice -> its settings in the checks (`config` and `default` use the defaults), as a recipe's table
            has them; or a list of such, each checked by itself. The checks' transcoder has 3 layers of 41 features.
        recipe: further tables that the checks' recipe needs, such as `model`.

    Raises:
        Faults: `settings` names a choice that the plugin does not offer, or settings that the choice does not have.
    """
    plugins, infos, module = _loaded(plugin)
    names = {info.name for info in infos}
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", repr(plugin))
    failures = [str(failure) for failure in plugins.failures if failure.plugin in names]
    if failures or not infos:
        problem = "; ".join(failures) or f"no plugin or module is called {name!r}"
        return [Case(plugin=name, label=name, check="load", plugins=plugins, problem=problem)]
    remaining = dict(settings or {})
    common: dict[str, Any] = {"plugin": name, "tables": recipe or {}, "plugins": plugins, "module": module}
    out = []
    for info in infos:
        outcomes: dict[str, Outcome] = {}
        out += [
            Case(label=info.name, check=check, slot=PLUGIN, choice=info.name, outcomes=outcomes, **common)
            for check in checks_of(PLUGIN)
        ]
    for slot in BY_TABLE:
        for choice in plugins.choices(slot).values():
            if choice.plugin not in names:
                continue
            for number, (label, used) in enumerate(_variants(choice.spec.name, remaining.pop(choice.spec.name, {}))):
                if used:
                    _read(plugins, slot, choice.spec.name, used, label)
                chosen = {**common, "slot": slot, "choice": choice.spec.name, "settings": used, "outcomes": {}}
                out += [
                    Case(label=label, check=check.name, **chosen)
                    for check in checks_of(slot).values()
                    if number == 0 or not check.once
                ]
    if remaining:
        known = [case.choice for case in out if case.slot != PLUGIN]
        texts = [f"{name} offers no choice {each!r}{did_you_mean(each, known)}" for each in remaining]
        raise Refused("settings", "; ".join(texts))
    return out


def _read(plugins: Plugins, slot: str, choice: str, settings: Any, label: str) -> None:
    """
    Raises:
        Faults: the choice has no such settings, or not with such values; each by its path, `settings.LABEL.KEY`.
    """
    if not isinstance(settings, Mapping):
        raise Refused("settings", f"of {label!r}: expected a table, or a list of tables, got {settings!r:.100}")
    try:
        structure_choice(plugins, slot, {"name": choice, **settings})
    except Faults as error:
        raise Faults(attrs.evolve(one, where=("settings", label, *one.where[1:])) for one in error.faults) from None


def _variants(choice: str, settings: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(label, settings) of a choice: one, or one for each of a list."""
    if not isinstance(settings, list | tuple):
        yield choice, settings
        return
    for number, variant in enumerate(settings, start=1):
        yield f"{choice}#{number}", variant


def _loaded(plugin: Any) -> tuple[Plugins, list[Info], str | None]:
    """All plugins, those of them that were meant, and the module that other processes import."""
    plugins = load_plugins()
    if isinstance(plugin, str):
        plugin = module_name(plugin)
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", type(plugin).__name__)
    infos = [info for info in plugins.infos if name in (info.name, info.distribution.split()[0]) or _is(info, plugin)]
    if infos:
        return plugins, infos, None
    importer = (lambda: imported(plugin)) if isinstance(plugin, str) else (lambda: plugin)
    plugins._add(name, "not installed", importer)
    return plugins, [info for info in plugins.infos if info.name == name], name


def _is(info: Info, plugin: Any) -> bool:
    """Whether a module, or one of this name, is that plugin."""
    if isinstance(plugin, str):
        try:
            spec = find_spec(plugin)
        except (ImportError, ValueError):
            return False
        return spec is not None and bool(info.file) and spec.origin == info.file
    return bool(info.file) and getattr(plugin, "__file__", None) == info.file


def parametrize(
    plugin: str | ModuleType | Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """A pytest decorator: the test gets each case of a plugin in turn, as `case`; see `cases`.

    Args:
        expected_failures: `choice/check` -> why it is meant to fail (a straight-through gradient). A case that passes
            although it is listed here is a failure: remove it from the list.

    Raises:
        Refused: `expected_failures` names a case that does not exist.
    """
    import pytest

    expected = dict(expected_failures or {})
    parameters = []
    all_cases = cases(plugin, settings=settings, recipe=recipe)
    known = [str(case) for case in all_cases]
    unknown = [name for name in expected if name not in known]
    if unknown and not any(case.problem for case in all_cases):
        lines = [f"there is no case {name!r}{did_you_mean(name, known)}" for name in unknown]
        raise Refused("expected_failures", f"{'; '.join(lines)} (known: {', '.join(known)})")
    for case in all_cases:
        meant = frozenset(other.check for other in all_cases if other.label == case.label and str(other) in expected)
        reason = expected.get(str(case))
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, raises=Nonconformance, reason=reason)]
        parameters.append(pytest.param(attrs.evolve(case, expected=meant), id=str(case), marks=marks))
    return pytest.mark.parametrize("case", parameters)
