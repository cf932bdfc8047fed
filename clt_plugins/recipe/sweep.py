"""`[sweep]`: one recipe for many transcoders.

```toml
[sweep]
"activation.k" = [32, 64, 128]          # settings as `--set` names them, each with a list of values
tying = ["untied", { name = "per_source" }]     # or of whole tables
seed = [0, 1, 2]
zip = [["activation.k", "tying"]]       # these go together, the first with the first; all else is multiplied
```

Each combination is a member: the recipe with these settings, typed and checked like any other. Its label names them
(`k=32,seed=0`), and is the name of its folder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.errors import Fault, Faults, Refused, Where, names
from clt_plugins.recipe.moved import moved_key
from clt_plugins.recipe.overrides import parts_of, put, whole_list
from clt_plugins.toml import inline

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe

TABLE = "sweep"
ZIP = "zip"
"""The key of `[sweep]` that is no setting."""
SAME = {
    "name": "all members are of one sweep",
    "requires": "all members run with the same plugins",
    "parallel": "all members run in the same processes",
    TABLE: "a sweep has no sweep in it",
}
"""What no member can have for itself, and why."""
MOST = 1000
"""Members of a sweep."""
LONGEST = 100
"""Characters of a label, which names a folder."""


@attrs.frozen(kw_only=True)
class Member:
    """One transcoder of a sweep."""

    label: str
    """`k=32,seed=0`: its folder's name."""
    settings: dict[str, Any]
    """What the sweep sets, as plain data, by key."""
    recipe: Recipe
    """The recipe with these settings: that of a run alone."""


@attrs.frozen(kw_only=True)
class Sweep:
    """A recipe with `[sweep]`, read."""

    keys: list[str]
    """The settings that differ between members."""
    members: list[Member]
    """In the order in which the recipe lists values; the first key changes slowest."""


@attrs.frozen(kw_only=True)
class Axis:
    """A setting of `[sweep]` with its values."""

    key: str
    values: list[Any]

    @property
    def parts(self) -> list[str]:
        """The path, as `--set` takes it."""
        return parts_of(self.key)


def members(
    stated: Any, table: Mapping[str, Any], typed: Callable[[dict[str, Any]], Recipe]
) -> tuple[list[str], list[Member]]:
    """The keys and members of a sweep.

    Args:
        stated: the table `[sweep]`.
        table: the other tables of the recipe, defaults included.
        typed: makes a recipe of tables, which it may change.

    Raises:
        Faults: all of `[sweep]`, then all of the members'; those of a value name its key.
    """
    axes, groups = _axes(stated)
    labels = _labels(axes, groups)
    out = []
    found: dict[Fault, dict[str, None]] = {}
    """Faults, each once, since members share most of a recipe; and the values of the key that it names."""
    for label, chosen in zip(labels, _combinations(axes, groups), strict=True):
        changed = copy.deepcopy(dict(table))
        paths, made = dict[str, Where](), dict[str, list[Where]]()
        settings = {axis.key: axis.values[index] for axis, index in zip(axes, chosen, strict=True)}
        wrong = []
        for axis in axes:
            try:
                paths[axis.key] = put(
                    changed, axis.parts, copy.deepcopy(settings[axis.key]), made.setdefault(axis.key, [])
                )
            except ValueError as error:
                wrong.append(Fault((TABLE, axis.key), str(error)))
        try:
            if wrong:
                raise Faults(wrong)
            out.append(Member(label=label, settings=settings, recipe=typed(changed)))
        except Faults as error:
            for one in error.faults:
                key, named = _of_member(one, paths, made)
                found.setdefault(named, {}).update({inline(settings[key])[:80]: None} if key else {})
    if found:
        counts: dict[Where, int] = {
            (TABLE, axis.key): len({inline(value)[:80] for value in axis.values}) for axis in axes
        }
        raise Faults(
            attrs.evolve(one, text=f"{value}{one.text}")
            for one, values in found.items()
            # A fault at all values is not one value's.
            for value in ([f"{value}: " for value in values] if 0 < len(values) < counts[one.where] else [""])
        )
    return [axis.key for axis in axes], out


def _axes(stated: Any) -> tuple[list[Axis], list[list[int]]]:
    """The settings with their values, and which of them go together: groups of their numbers.

    Raises:
        Faults: all of them.
    """
    if not isinstance(stated, Mapping):
        raise Refused(TABLE, f"expected a table of settings, each with a list of values, got {inline(stated)[:80]}")
    faults: list[Fault] = []
    axes: list[Axis] = []
    # `--set sweep.activation.k=[...]` stands after what the file says, and in its place.
    flat = _flat({key: value for key, value in stated.items() if key != ZIP})
    for key, values in {".".join(parts_of(key)): (key, values) for key, values in flat}.values():
        if not parts_of(key) or not all(parts_of(key)):
            faults.append(Fault((TABLE, key), "expected a setting's path, such as activation.k"))
        elif instead := moved_key(parts_of(key)):
            faults.append(Fault((TABLE, key), f"has moved: write {inline(instead)}"))
        elif parts_of(key)[0] in SAME:
            faults.append(Fault((TABLE, key), f"cannot be swept: {SAME[parts_of(key)[0]]}"))
        elif not isinstance(values, list) or not values:
            faults.append(Fault((TABLE, key), f"expected a list of values, got {inline(values)[:80]}"))
        elif any(value in values[:number] for number, value in enumerate(values)):
            faults.append(Fault((TABLE, key), f"has the same value twice: {inline(values)[:80]}"))
        else:
            axes.append(Axis(key=key, values=values))
    dotted = [".".join(axis.parts) for axis in axes]
    for number, path in enumerate(dotted):
        if any(names([other], path) or names([path], other) for other in dotted[:number]):
            faults.append(Fault((TABLE, axes[number].key), "is also set by another key of the sweep: keep one of them"))
    groups = _groups(stated.get(ZIP, []), axes, faults)
    if not faults and not axes:
        faults.append(Fault((TABLE,), 'has no setting: give one with its values, such as "activation.k" = [32, 64]'))
    if not faults and (count := _count(axes, groups)) > MOST:
        faults.append(Fault((TABLE,), f"makes {count:,} transcoders, more than {MOST:,}: leave out values"))
    if faults:
        raise Faults(faults)
    return axes, groups


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """`"activation.k" = [...]` and `activation.k = [...]` are the same."""
    for key, value in table.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        else:
            yield path, value


def _groups(stated: Any, axes: Sequence[Axis], faults: list[Fault]) -> list[list[int]]:
    """The numbers of axes that go together; an axis that `zip` does not name is alone."""
    numbers = {axis.key: number for number, axis in enumerate(axes)}
    groups: list[list[int]] = []
    if not isinstance(stated, list) or not all(isinstance(group, list) for group in stated):
        text = f'expected lists of keys, such as [["activation.k", "train.lr"]], got {inline(stated)[:80]}'
        faults.append(Fault((TABLE, ZIP), text))
        stated = []
    seen: set[int] = set()
    for group in stated:
        unknown = [key for key in group if key not in numbers]
        if unknown:
            known = ", ".join(numbers) or "none"
            faults.append(Fault((TABLE, ZIP), f"{inline(unknown[0])} is no setting of the sweep (known: {known})"))
            continue
        own = [numbers[key] for key in group]
        lengths = {len(axes[number].values) for number in own}
        if len(own) < 2 or len(lengths) > 1:
            told = ", ".join(f"{axes[number].key} has {len(axes[number].values)}" for number in own)
            text = f"keys that go together must be two at least, with as many values each: {told or 'none'}"
            faults.append(Fault((TABLE, ZIP), text))
        if seen & {*own} or len({*own}) < len(own):
            faults.append(Fault((TABLE, ZIP), f"names a key twice: {', '.join(group)}"))
        seen |= {*own}
        groups.append(own)
    groups += [[number] for number in range(len(axes)) if number not in seen]
    return sorted(groups)


def _count(axes: Sequence[Axis], groups: Sequence[Sequence[int]]) -> int:
    count = 1
    for group in groups:
        count *= len(axes[group[0]].values)
    return count


def _combinations(axes: Sequence[Axis], groups: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """For each member the number of its value on each axis."""
    for chosen in product(*(range(len(axes[group[0]].values)) for group in groups)):
        index = {number: at for group, at in zip(groups, chosen, strict=True) for number in group}
        yield [index[number] for number in range(len(axes))]


def _labels(axes: Sequence[Axis], groups: Sequence[Sequence[int]]) -> list[str]:
    """A name for each member, all different, and none in another's way on disks that ignore the case of letters."""
    short = _short([axis.parts for axis in axes])
    texts = []
    for axis in axes:
        texts.append(_different([_text(value) for value in axis.values]))
    labels = []
    for chosen in _combinations(axes, groups):
        pairs = zip(short, axes, texts, chosen, strict=True)
        labels.append(",".join(f"{name}={own[index]}" for name, _, own, index in pairs)[:LONGEST])
    return _different(labels)


def _different(texts: list[str]) -> list[str]:
    """The texts, with numbers after those that would be the same."""
    seen: dict[str, int] = {}
    out = []
    for text in texts:
        count = seen[text.lower()] = seen.get(text.lower(), 0) + 1
        if count > 1:
            text = f"{text}-{count}"
            seen[text.lower()] = 1
        out.append(text)
    return out


def _short(paths: Sequence[Sequence[str]]) -> list[str]:
    """The last part of each path; more where several end alike."""
    out = []
    for path in paths:
        length = 1
        while length < len(path) and sum(list(other[-length:]) == list(path[-length:]) for other in paths) > 1:
            length += 1
        out.append(_clean(".".join(path[-length:])))
    return out


def _text(value: Any) -> str:
    """A value in a folder's name: a choice by its name, a list of them joined."""
    if isinstance(value, Mapping):
        return _text(value.get("name", "table"))
    if isinstance(value, list):
        return "+".join(_text(item) for item in value) or "none"
    return _clean(value if isinstance(value, str) else inline(value))


def _clean(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip(".-") or "x"


def _of_member(one: Fault, paths: Mapping[str, Where], made: Mapping[str, list[Where]]) -> tuple[str, Fault]:
    """The key of `[sweep]` that a member's fault comes from, and the fault with its path; "" and the fault itself where
    it comes from none.

    Args:
        paths: by key, where its value is.
        made: by key, the tables that were made on the way there.
    """
    for key, path in [*paths.items(), *((key, path) for key, several in made.items() for path in several)]:
        if one.where[: len(path)] == path:
            below = Fault(one.where[len(path) :], "").path
            return key, Fault((TABLE, key), f"{below}: {one.text}" if below else whole_list(one, path, parts_of(key)))
    return "", one
