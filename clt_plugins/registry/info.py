"""What is known of a plugin: where it comes from, whether it was loaded, and what to do about one that is broken."""

from __future__ import annotations

import inspect
from typing import Any

import attrs

UNNAMED = ("by -p", "not installed")
"""What stands for the distribution of a plugin that has none."""


@attrs.frozen
class Info:
    """A plugin, for listings and `versions.json`."""

    name: str
    distribution: str
    """With version."""
    status: str
    """`active`, `failed` or `blocked`."""
    file: str = ""
    hooks: tuple[str, ...] = ()


@attrs.frozen
class Failure:
    """A plugin that could not be used, or only in part."""

    plugin: str
    distribution: str
    error: BaseException

    def __str__(self) -> str:
        text = " ".join(str(self.error).split())
        named = f"{self.plugin} ({self.distribution}): {type(self.error).__name__}: {text}"
        # The text of a clash says which plugin to block.
        return named if "-p no:" in text else f"{named}; {remedy(self.plugin, self.distribution)}"


def remedy(plugin: str, distribution: str) -> str:
    """What a user can do about a plugin that is broken."""
    if distribution in UNNAMED:
        return f"mend the module {plugin!r}"
    return f"update it (pip install -U {name_of(distribution)}), or leave it out (-p no:{plugin})"


def name_of(distribution: str) -> str:
    """The name in `clt-plugins 0.1.0`."""
    return distribution.split()[0]


def source_file(plugin: Any) -> str:
    """The file a plugin (a module, or an object of one) was loaded from; "" where there is none."""
    if plugin is None:
        return ""
    module = plugin if inspect.ismodule(plugin) else inspect.getmodule(type(plugin))
    return getattr(module, "__file__", None) or ""
