"""Which checks there are: `@check("activation", "tying")` registers a function for these tables of a recipe.

The checks of a kind are in the module `clt_plugins.testing.checks.<kind>`. It is imported when its checks are asked
for: it needs torch, and `plugins --check` must start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import attrs

from clt_plugins.contract.slots import BY_TABLE

if TYPE_CHECKING:
    from clt_plugins.testing.bench import Bench

F = TypeVar("F", bound="Callable[[Bench], None]")

SHARED = ("every", "training_step", "resume", "tensor_parallel", "positions")
"""The modules of checks that are not called after a kind."""


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

    @property
    def name(self) -> str:
        return self.run.__name__


_checks: dict[str, dict[str, Check]] = {table: {} for table in BY_TABLE}


def check(*tables: str, trial: bool = False, once: bool = False) -> Callable[[F], F]:
    """Register a function as the check of its name.

    Args:
        tables: the recipe's tables whose choices it checks; all tables if none is named.
        trial, once: see `Check`.
    """

    def register(function: F) -> F:
        new = Check(function, tables or tuple(BY_TABLE), trial, once)
        for table in new.tables:
            assert new.name not in _checks[table], f"{table} has two checks {new.name!r}"
            _checks[table][new.name] = new
        return function

    return register


def checks_of(table: str) -> dict[str, Check]:
    """The checks of a recipe's table by name, those that serve several kinds first."""
    for module in (*SHARED, BY_TABLE[table].kind):
        import_module(f"clt_plugins.testing.checks.{module}")
    return dict(_checks[table])


def checks_by_table() -> dict[str, tuple[str, ...]]:
    """Recipe table -> the names of its checks, without those that every choice has."""
    every = tuple(BY_TABLE)
    return {table: tuple(name for name, one in checks_of(table).items() if one.tables != every) for table in BY_TABLE}
