"""A check of a choice: how it is run, and what comes of it."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Choice
from clt_plugins.errors import Faults, PluginError
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.registry import PLUGIN, checks_of, needed
from clt_plugins.testing.report import Nonconformance, location, message, one_line, passed_through

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
