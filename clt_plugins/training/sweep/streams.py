"""Which members read the same stream.

A stream is made by `[source]` and `[model]` from the seed of the data, for batches of one size, on one device. So
members that differ in one of these are on streams of their own; all others share one, and the language model reads each
batch once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.recipe.read import recipe_data
from clt_plugins.toml import inline

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.recipe.sweep import Member


@attrs.frozen(kw_only=True)
class Group:
    """Members that are trained at a time, on one stream."""

    stream: int
    """The stream's number, from 0."""
    members: list[Member]


def grouped(members: Sequence[Member], at_once: int | None = None) -> list[Group]:
    """The groups, in the order in which they are trained; the members of one keep their order.

    Args:
        at_once: members of a group at most; None: all of a stream.
    """
    by_stream: dict[str, list[Member]] = {}
    for member in members:
        by_stream.setdefault(inline(made_of(member.recipe)), []).append(member)
    groups = []
    for number, several in enumerate(by_stream.values()):
        size = at_once or len(several)
        groups += [
            Group(stream=number, members=several[first : first + size]) for first in range(0, len(several), size)
        ]
    return groups


def made_of(recipe: Recipe) -> dict[str, Any]:
    """What a stream depends on, as plain data."""
    data = recipe_data(recipe)
    return {
        "source": data["source"],
        "model": data.get("model", {}),
        "seed": recipe.seed_of_data,
        "batch_tokens": recipe.train.batch_tokens,
        "device": recipe.transcoder.device,
    }
