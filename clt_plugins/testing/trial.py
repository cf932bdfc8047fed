"""`plugins --check`: choices are built with their defaults and used for a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

import attrs

from clt_plugins.registry.discovery import OWN
from clt_plugins.registry.info import UNNAMED, name_of
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.case import Case
from clt_plugins.testing.registry import PLUGIN, checks_of
from clt_plugins.testing.report import Nonconformance


@attrs.define
class Tried:
    """What was tried of a distribution, or of a plugin that was named by `-p`."""

    of: str
    """Its name."""
    choices: int = 0
    passed_over: list[str] = attrs.field(factory=list)
    """Choices without a default that is enough: only a recipe can give their settings."""
    faults: list[str] = attrs.field(factory=list)
    """One line each: the first of a plugin as a whole, and of each choice."""

    def data(self) -> dict[str, Any]:
        return attrs.asdict(self)

    def __str__(self) -> str:
        tried = {0: self.of, 1: f"1 choice of {self.of}"}.get(self.choices, f"{self.choices} choices of {self.of}")
        count = len(self.faults)
        found = f"{count} fault{'s' if count > 1 else ''}" if count else "all well"
        names = ", ".join(self.passed_over)
        return f"tried {tried}: {found}" + (f"; not tried, since it needs settings: {names}" if names else "")


def trial(plugins: Plugins, listed: Mapping[str, Any], *, own: bool) -> list[Tried]:
    """What the checks with `trial=True` find in plugins and choices, by distribution.

    Args:
        listed: which ones, as `clt_plugins.cli.listing.listing` gives them. The plugin of a choice is checked too.
        own: also those of this distribution.
    """
    known = {info.name: info for info in plugins.infos}
    wanted = [name for name, info in known.items() if own or name_of(info.distribution) != OWN]
    choices = [
        (slot, each["name"], each["plugin"])
        for slot, offered in listed["choices"].items()
        for each in offered
        if each["plugin"] in wanted
    ]
    names = {each["name"] for each in listed["plugins"] if each["name"] in wanted} | {name for *_, name in choices}
    subjects = [(PLUGIN, name, name) for name in sorted(names) if known[name].status == "active"] + choices
    found: dict[str, Tried] = {}
    for slot, name, plugin in subjects:
        distribution = known[plugin].distribution
        of = plugin if distribution in UNNAMED else name_of(distribution)
        tried = found.setdefault(of, Tried(of))
        tried.choices += slot != PLUGIN
        for check in checks_of(slot).values():
            case = Case(plugin=plugin, label=name, check=check.name, slot=slot, choice=name, plugins=plugins)
            try:
                if check.trial:
                    case.run_alone(trial=True)
            except SkipTest:
                if check.name == "default":
                    tried.choices -= 1
                    tried.passed_over.append(name)
                    break
            except Nonconformance as error:
                tried.faults.append(" ".join(str(error).split()))
                break
    return list(found.values())
