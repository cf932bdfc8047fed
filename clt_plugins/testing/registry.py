"""Which checks there are: `@check("activation", "tying")` registers a function for these tables of a recipe.

The checks of a kind are in the module `clt_plugins.testing.checks.<kind>`. It is imported when its checks are asked
for: it needs torch, and `plugins --check` must start quickly.

One cause gives one failure: where a check that is `basic` fails, the others of the table are skipped, as are those that
name it in `needs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import attrs

from clt_plugins.contract.slots import BY_TABLE

if TYPE_CHECKING:
    from clt_plugins.testing.bench import Bench

F = TypeVar("F", bound="Callable[[Bench], None]")

SHARED = ("every", "training_step", "empty_pairs", "causal", "resume", "tensor_parallel", "data_parallel", "positions")
"""The modules of checks that are not called after a kind."""
PLUGIN = "plugin"
"""Stands for a table: the checks of a plugin as a whole, and of hooks that offer no choice."""


@attrs.frozen
class Check:
    """One thing that the kit asks of a choice; the function's docstring says what."""

    run: Callable[[Bench], None]
    tables: tuple[str, ...]
    """The recipe's tables whose choices it checks."""
    trial: bool
    """Whether it shows that a choice works at all: `plugins --check` runs these."""
    once: bool
    """Whether it does not depend on the settings: of several settings, only the first is checked."""
    basic: bool = False
    """Whether the others of the table are skipped where it fails."""
    needs: tuple[str, ...] = ()
    """Checks that fail for causes which would let this one fail too: it is skipped where one of them failed."""

    @property
    def name(self) -> str:
        return self.run.__name__


_checks: dict[str, dict[str, Check]] = {table: {} for table in (*BY_TABLE, PLUGIN)}


def check(
    *tables: str, trial: bool = False, once: bool = False, basic: bool = False, needs: Sequence[str] = ()
) -> Callable[[F], F]:
    """Register a function as the check of its name.

    Args:
        tables: the recipe's tables whose choices it checks; all tables if none is named.
        trial, once, basic, needs: see `Check`.
    """

    def register(function: F) -> F:
        new = Check(function, tables or tuple(BY_TABLE), trial, once, basic, tuple(needs))
        for table in new.tables:
            assert new.name not in _checks[table], f"{table} has two checks {new.name!r}"
            _checks[table][new.name] = new
        return function

    return register


def checks_of(table: str) -> dict[str, Check]:
    """The checks of a recipe's table, or of `PLUGIN`, by name: those of every choice, the basic ones, the others."""
    for module in (PLUGIN,) if table == PLUGIN else (*SHARED, BY_TABLE[table].kind):
        import_module(f"clt_plugins.testing.checks.{module}")
    return dict(sorted(_checks[table].items(), key=lambda item: (not item[1].once, not item[1].basic)))


def needed(table: str, name: str) -> list[str]:
    """The checks whose failure would let this one fail too, those that they need first."""
    checks = checks_of(table)
    own = checks[name]
    first = [] if own.basic or own.once else [each.name for each in checks.values() if each.basic]
    found: list[str] = []
    for other in (*first, *(other for other in own.needs if other in checks)):
        found += [each for each in (*needed(table, other), other) if each not in found]
    return found


def checks_by_table() -> dict[str, tuple[str, ...]]:
    """Recipe table (or `PLUGIN`) -> the names of its checks, without those that every choice has."""
    every = tuple(BY_TABLE)
    return {
        table: tuple(name for name, one in checks_of(table).items() if one.tables != every)
        for table in (*BY_TABLE, PLUGIN)
    }
