"""Where plugins are found: entry points of installed distributions, or the table of a checkout's pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import tomllib
from pathlib import Path

import attrs

from clt_plugins.registry.info import name_of

logger = logging.getLogger(__name__)

GROUP = "clt_plugins"
OWN = "clt-plugins"
ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the engine: a checkout, or site-packages."""


@attrs.frozen
class Found:
    """A plugin that could be loaded."""

    name: str
    distribution: str
    """With version."""
    entry: importlib.metadata.EntryPoint


def find_plugins() -> list[Found]:
    """All plugins on this machine, the engine's own first where names are equal, else sorted by name and distribution.

    The standard library's `entry_points` counts a distribution that is on the path twice once.
    """
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        dist = entry.dist
        label = f"{dist.name} {dist.version}" if dist is not None else "unknown"
        found.append(Found(entry.name, label, entry))
    if not any(_is_own(each) for each in found):
        found += _from_checkout()
    return sorted(found, key=lambda each: (each.name, not _is_own(each), each.distribution))


def _is_own(found: Found) -> bool:
    return name_of(found.distribution).lower().replace("_", "-") == OWN


def _from_checkout() -> list[Found]:
    """The built-in plugins of a checkout that is not installed."""
    file = ROOT / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"] if file.is_file() else {}
    if project.get("name") != OWN:
        logger.warning("no built-in plugins found: install the distribution (pip install clt-plugins)")
        return []
    logger.info("clt-plugins is not installed: its plugins are taken from the checkout %s", ROOT)
    plugins = str(ROOT / "plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)
    return [
        Found(name, f"{OWN} {project['version']} (checkout)", importlib.metadata.EntryPoint(name, module, GROUP))
        for name, module in project["entry-points"][GROUP].items()
    ]
