"""Abilities of a source, for an object that stands before it."""

from __future__ import annotations

from collections.abc import Collection
from inspect import ismethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clt_plugins.contract.reading.source import Source


def lend(source: Source, other: Any, but: Collection[str] = ()) -> None:
    """Give an object that stands in a source's place the methods of the source that it does not have, and so its
    abilities: they are asked for by `isinstance`, which looks at what an object has.

    Args:
        but: names of methods that it is not given.
    """
    of_class = [name for name in dir(type(source)) if callable(getattr(type(source), name))]
    lent = [name for name, value in getattr(source, "__dict__", {}).items() if ismethod(value)]  # to the source itself
    for name in [*of_class, *lent]:
        if name[0] != "_" and name not in but and not hasattr(other, name):
            setattr(other, name, getattr(source, name))
