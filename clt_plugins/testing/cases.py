"""One case for each (choice, check) of a plugin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Choice
from clt_plugins.errors import PluginError, Refused
from clt_plugins.registry.info import Info
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.testing.registry import checks_of
from clt_plugins.testing.report import Nonconformance, location, message, one_line

Settings = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""Choice -> its settings, or several of them."""


@attrs.frozen(kw_only=True)
class Case:
    """One check of one choice; `str(case)` is `choice/check`, or `choice#2/check` for its second settings."""

    plugin: str
    """As it was named to `cases`."""
    label: str
    """The choice, with the number of its settings where there are several."""
    check: str
    slot: str = ""
    """The recipe's table."""
    choice: str = ""
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    tables: Mapping[str, Any] = attrs.field(factory=dict)
    """Further tables of the check's recipe."""
    plugins: Plugins = attrs.field(repr=False, eq=False)
    module: str | None = None
    """What other processes import the plugin by, where it is not installed."""
    problem: str | None = None
    """Why nothing else can be checked."""

    def __str__(self) -> str:
        return f"{self.label}/{self.check}"

    def run(self) -> None:
        """Do the check.

        Raises:
            Nonconformance: what was expected, what came, where to look.
            unittest.SkipTest: it cannot be checked here, and why; pytest shows it as skipped.
        """
        if self.problem is not None:
            raise Nonconformance(f"{self.plugin} cannot be loaded\n     got: {self.problem}")
        from clt_plugins.testing.bench import Bench

        check = checks_of(self.slot)[self.check]
        choice = self.plugins.pick(self.slot, self.choice)
        title = f"{BY_TABLE[self.slot].kind} {self.choice!r} of {choice}, check {self.check!r}"
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            bench = Bench(self.plugins, self.slot, self.choice, self.settings, self.tables, self.module, Path(folder))
            try:
                check.run(bench)
            except SkipTest:
                raise
            except Nonconformance as error:
                raise Nonconformance(f"{title}:\n{error}") from error
            except Exception as error:
                text = message("the check runs through", one_line(error), _location(error, choice))
                raise Nonconformance(f"{title}:\n{text}") from error


def _location(error: BaseException, choice: Choice) -> str:
    """Where an error of a plugin came from; the plugin's file where the engine found the fault from outside."""
    if isinstance(error, PluginError):
        return choice.file if error.__cause__ is None else location(error.__cause__)
    return location(error)


def cases(
    plugin: str | ModuleType | Any, *, settings: Settings | None = None, recipe: Mapping[str, Any] | None = None
) -> list[Case]:
    """All cases of a plugin.

    Some checks start processes, which import the main script: a script that runs cases outside of pytest needs
    `if __name__ == "__main__":`.

    Args:
        plugin: the name of an installed plugin or distribution, or a module: its name, or itself.
        settings: choice -> its settings in the checks (`config` and `default` use the defaults), as a recipe's table
            has them; or a list of such, each checked by itself. The checks' transcoder has 3 layers of 41 features.
        recipe: further tables that the checks' recipe needs, such as `model`.

    Raises:
        Refused: `settings` names a choice that the plugin does not offer.
    """
    plugins, infos, module = _loaded(plugin)
    names = {info.name for info in infos}
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", repr(plugin))
    failures = [str(failure) for failure in plugins.failures if failure.plugin in names]
    if failures or not infos:
        problem = "; ".join(failures) or f"no plugin or module is called {name!r}"
        return [Case(plugin=name, label=name, check="load", plugins=plugins, problem=problem)]
    remaining = dict(settings or {})
    out = []
    for slot in BY_TABLE:
        for choice in plugins.choices(slot).values():
            if choice.plugin not in names:
                continue
            for number, (label, used) in enumerate(_variants(choice.spec.name, remaining.pop(choice.spec.name, {}))):
                out += [
                    Case(
                        plugin=name,
                        label=label,
                        check=check.name,
                        slot=slot,
                        choice=choice.spec.name,
                        settings=used,
                        tables=recipe or {},
                        plugins=plugins,
                        module=module,
                    )
                    for check in checks_of(slot).values()
                    if number == 0 or not check.once
                ]
    if remaining:
        raise Refused("settings", f"{name} offers no choice {', '.join(map(repr, remaining))}")
    return out


def _variants(choice: str, settings: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(label, settings) of a choice: one, or one for each of a list."""
    if isinstance(settings, Mapping):
        yield choice, settings
        return
    for number, variant in enumerate(settings, start=1):
        yield f"{choice}#{number}", variant


def _loaded(plugin: Any) -> tuple[Plugins, list[Info], str | None]:
    """All plugins, those of them that were meant, and the module that other processes import."""
    plugins = load_plugins()
    name = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", type(plugin).__name__)
    infos = [info for info in plugins.infos if name in (info.name, info.distribution.split()[0]) or _is(info, plugin)]
    if infos:
        return plugins, infos, None
    importer = (lambda: import_module(plugin)) if isinstance(plugin, str) else (lambda: plugin)
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
    for case in all_cases:
        reason = expected.pop(str(case), None)
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, raises=Nonconformance, reason=reason)]
        parameters.append(pytest.param(case, id=str(case), marks=marks))
    if expected and not any(case.problem for case in all_cases):
        raise Refused("expected_failures", f"there is no case {', '.join(map(repr, expected))}")
    return pytest.mark.parametrize("case", parameters)
