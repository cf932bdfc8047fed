"""`plugins --check`: choices are built with their defaults and used for a step."""

from __future__ import annotations

from collections.abc import Collection
from unittest import SkipTest

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.cases import Case
from clt_plugins.testing.registry import checks_of
from clt_plugins.testing.report import Nonconformance


def trial(plugins: Plugins, names: Collection[str]) -> list[str]:
    """The faults, one line each, that the checks with `trial=True` find in the choices of some plugins.

    The first fault of a choice is told. A choice that needs settings which only a recipe can give is passed over.

    Args:
        names: of the plugins.
    """
    faults = []
    for slot in BY_TABLE:
        for choice in plugins.choices(slot).values():
            if choice.plugin not in names:
                continue
            name = choice.spec.name
            for check in checks_of(slot).values():
                case = Case(plugin=choice.plugin, label=name, check=check.name, slot=slot, choice=name, plugins=plugins)
                try:
                    if check.trial:
                        case.run()
                except SkipTest:
                    break
                except Nonconformance as error:
                    faults.append(" ".join(str(error).split()))
                    break
    return faults
