"""`plugins --check`: choices are built with their defaults and used for a step."""

from __future__ import annotations

from collections.abc import Collection
from unittest import SkipTest

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.cases import Case
from clt_plugins.testing.registry import PLUGIN, checks_of
from clt_plugins.testing.report import Nonconformance


def trial(plugins: Plugins, names: Collection[str]) -> list[str]:
    """The faults, one line each, that the checks with `trial=True` find in some plugins and their choices.

    The first fault of a plugin, and of each choice, is told. A choice that needs settings which only a recipe can give
    is passed over.

    Args:
        names: of the plugins.
    """
    faults = []
    subjects = [
        (PLUGIN, name, name)
        for name in sorted(names)
        if any(i.name == name and i.status == "active" for i in plugins.infos)
    ]
    for slot in BY_TABLE:
        subjects += [(slot, c.spec.name, c.plugin) for c in plugins.choices(slot).values() if c.plugin in names]
    for slot, name, plugin in subjects:
        for check in checks_of(slot).values():
            case = Case(plugin=plugin, label=name, check=check.name, slot=slot, choice=name, plugins=plugins)
            try:
                if check.trial:
                    case.run_alone(trial=True)
            except SkipTest:
                if check.name == "default":
                    break  # it needs settings
            except Nonconformance as error:
                faults.append(" ".join(str(error).split()))
                break
    return faults
