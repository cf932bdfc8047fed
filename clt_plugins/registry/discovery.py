"""Where plugins are found: entry points of installed distributions, or the table of a checkout's pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import tomllib
from functools import cache
from pathlib import Path

import attrs

from clt_plugins.registry.info import name_of

logger = logging.getLogger(__name__)

GROUP = "clt_plugins"
OWN = "clt-plugins"
ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the engine: a checkout, or site-packages."""


@attrs.frozen
class Installed:
    """A plugin that could be loaded."""

    name: str
    distribution: str
    """With version."""
    entry: importlib.metadata.EntryPoint


def find_plugins() -> list[Installed]:
    """All plugins on this machine, the engine's own first where names are equal, else sorted by name and distribution.

    The standard library's `entry_points` counts a distribution that is on the path twice once.
    """
    plugins = [
        Installed(entry.name, _label(entry.dist), entry) for entry in importlib.metadata.entry_points(group=GROUP)
    ]
    if not any(map(_is_own, plugins)):
        plugins += _from_checkout()
    return sorted(plugins, key=lambda plugin: (plugin.name, not _is_own(plugin), plugin.distribution))


@cache
def _label(dist: importlib.metadata.Distribution | None) -> str:
    """Name and version of a distribution.

    `dist.name` and `dist.version` would each parse all of the metadata, for every plugin: a third of `--help`.
    """
    if dist is None:
        return "unknown"
    head = (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "").partition("\n\n")[0]
    said = dict(line.split(": ", 1) for line in head.splitlines() if line.startswith(("Name: ", "Version: ")))
    return f"{said.get('Name', 'unknown')} {said.get('Version', 'unknown')}"


def _is_own(plugin: Installed) -> bool:
    return name_of(plugin.distribution).lower().replace("_", "-") == OWN


def _from_checkout() -> list[Installed]:
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
        Installed(name, f"{OWN} {project['version']} (checkout)", importlib.metadata.EntryPoint(name, module, GROUP))
        for name, module in project["entry-points"][GROUP].items()
    ]
