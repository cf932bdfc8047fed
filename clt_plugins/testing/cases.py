"""One case for each (choice, check) of a plugin."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Choice
from clt_plugins.errors import Faults, PluginError, Refused, did_you_mean
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.by_name import imported, module_name
from clt_plugins.registry.info import Info
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.testing.registry import PLUGIN, checks_of, needed
from clt_plugins.testing.report import Nonconformance, location, message, one_line, passed_through

Settings = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""Choice -> its settings, or several of them."""

REFUSING = (("registry", "build.py"), ("recipe", "read.py"))
"""The files of the engine through which a refusal comes where settings are refused."""


@attrs.define
class Outcome:
    """What came of a check."""

    text: str = ""
    """How it failed, or why it was skipped."""
    failed: bool = False
    skipped: bool = False
    told: bool = True
    """False while it was only made for the sake of another."""
    error: Exception | None = None
    """What was raised."""

    def tell(self) -> None:
        """Raise what a test should see: one message, without the errors that it comes from (`__context__` has them)."""
        __tracebackhide__ = True
        if self.skipped:
            raise SkipTest(self.text)
        if self.failed:
            failure = Nonconformance(self.text)
            failure.__context__ = self.error
            raise failure from None


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
    expected: frozenset[str] = attrs.field(factory=frozenset, repr=False, eq=False)
    """The checks of the choice that are meant to fail: others do not wait for them."""
    outcomes: dict[str, Outcome] = attrs.field(factory=dict, repr=False, eq=False)
    """What came of the checks that were made so far. Shared by the cases of a choice with the same settings."""

    def __str__(self) -> str:
        return f"{self.label}/{self.check}"

    def run(self) -> None:
        """Do the check, and before it those that would fail for the same cause, if they were not made yet.

        Raises:
            Nonconformance: what was expected, what came, where to look.
            unittest.SkipTest: it cannot be checked here, or the cause is told by another check; says why. pytest shows
                it as skipped.
        """
        __tracebackhide__ = True  # pytest then shows the failure alone, without the kit's code
        if self.problem is not None:
            raise Nonconformance(f"{self.plugin} cannot be loaded\n     got: {self.problem}")
        for name in needed(self.slot, self.check):
            other = attrs.evolve(self, check=name)
            if name not in self.outcomes:
                with suppress(Nonconformance, SkipTest):
                    other.run_alone()
                self.outcomes[name].told = False
            if self.outcomes[name].failed and name not in self.expected:
                raise SkipTest(f"{other} failed, perhaps for the same cause: mend that first")
        made = self.outcomes.get(self.check)
        if made is None or made.told:
            self.run_alone()
            return
        made.told = True
        made.tell()

    def run_alone(self, *, trial: bool = False) -> None:
        """Do the check, whatever came of others.

        Args:
            trial: for `plugins --check`, to which nobody gives settings.

        Raises:
            Nonconformance: see `run`.
            unittest.SkipTest: see `run`.
        """
        __tracebackhide__ = True
        from clt_plugins.testing.bench import Bench

        check = checks_of(self.slot)[self.check]
        choice = None if self.slot == PLUGIN else self.plugins.pick(self.slot, self.choice)
        what = f"plugin {self.choice!r}"
        if choice is not None:
            what = f"{BY_TABLE[self.slot].kind} {self.choice!r} of {choice}"
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            subject = (self.plugins, self.slot, self.choice, self.settings, self.tables, self.module)
            bench = Bench(*subject, Path(folder), trial=trial)
            outcome = self._outcome(check.run, bench, choice)
        others = {name: other for name, other in self.outcomes.items() if other.failed and name != self.check}
        same = [name for name, other in others.items() if other.text.endswith(outcome.text)]
        if outcome.failed and same:
            outcome = Outcome(f"it fails as {self.label}/{same[0]} does: mend that first", skipped=True)
        if outcome.failed:
            outcome.text = f"{what}, check {self.check!r}:\n{outcome.text}"
        self.outcomes[self.check] = outcome
        outcome.tell()

    def _outcome(self, check: Callable[[Any], None], bench: Any, choice: Choice | None) -> Outcome:
        try:
            check(bench)
        except SkipTest as reason:
            return Outcome(str(reason), skipped=True)
        except Nonconformance as error:
            return Outcome(str(error), failed=True, error=error)
        except Exception as error:
            if not self.settings and choice is not None and refuses_settings(error):
                return Outcome(f"the default is refused: {one_line(error)}; give others by `settings`", skipped=True)
            file = "" if choice is None else choice.file
            place = file
            cause: BaseException = error
            # The same error is the same text, whether the engine has wrapped it or not.
            if isinstance(error, PluginError) and error.__cause__ and passed_through(error.__cause__, file):
                cause = error.__cause__
            if cause is not error or not isinstance(error, PluginError):
                place = location(cause, file)
            text = message("the check runs through", one_line(cause), place)
            return Outcome(text, failed=True, error=error)
        return Outcome()


def refuses_settings(error: Exception) -> bool:
    """Whether a choice, or the recipe around it, was refused before anything ran."""
    frames = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(error, Faults) and any(place in frames for place in REFUSING)


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
