"""What may differ when a run is resumed: content is compared, not spelling.

A checkpoint holds the recipe that it was trained by and, of sources that can tell, what their data are made from
(`Identified`). A resumed run differs from it in

free        where or how fast something is computed (`FREE_ON_RESUME`, [parallel], [kernels]), what is watched and what
            comes after training, the name of the run, rates of the optimizer; settings that the source's identity
            covers, as long as the content is the same; a plugin's new setting with its default
kept        with another number of steps: the steps that schedules go by, and settings that follow from the number where
            they are not given. So more steps are trained at the schedule's end
all else    refused, one line each with the old and the new value

What is kept or refused can be accepted by name (`--accept SETTING`). Fewer steps than are done are always refused.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.reading.source import Identified
from clt_plugins.contract.spec import Selected
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.errors import Fault, Faults, Refused, names, parse_path
from clt_plugins.recipe.changes import LR, SCHEDULE, STEPS, Change, changes
from clt_plugins.recipe.moved import move
from clt_plugins.toml import inline

if TYPE_CHECKING:
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.training.saved.checkpoint import TrainingState

logger = logging.getLogger(__name__)

DATA_TABLES = {"source", "model"}
"""Where other settings mean other data: a position in the old ones is none in the new ones."""


@attrs.frozen(kw_only=True)
class Before:
    """What a run goes on from, as the checkpoint has it."""

    folder: Path
    """The run's."""
    step: int
    """Steps done."""
    tables: dict[str, Any]
    """The recipe as plain data."""
    identity: dict[str, str]
    """What the data were made from, by setting."""
    data_ranks: int | None = None
    """How many data ranks shared the rows; None if their number changes no batch."""

    @classmethod
    def of(cls, folder: Path, state: TrainingState, recipe: str) -> Before:
        """
        Args:
            recipe: as TOML; that of the run's folder for checkpoints that hold none.
        """
        tables = tomllib.loads(recipe)
        move(tables)  # the run may be older
        return cls(
            folder=folder,
            step=state.step,
            tables=tables,
            identity=state.identity,
            data_ranks=state.source.get("data_ranks") if "of_source" in state.source else None,
        )


def check_settings(before: Before, recipe: Recipe, accepted: Collection[str]) -> dict[str, Any]:
    """Compare settings; returns those that stay what they were, with their values (`keep`).

    Raises:
        Faults: settings differ that must not; a line for each.
    """
    if recipe.train.steps < before.step:
        text = f"{recipe.train.steps}, but {before.step} steps are done: give more, or resume an earlier checkpoint"
        raise Refused(STEPS, text)
    if STEPS in accepted:
        accepted = {*accepted, SCHEDULE}
    faults: list[Fault] = []
    kept: dict[str, Any] = {}
    for change in [*_of_schedule(before, recipe), *changes(before.tables, recipe)]:
        # What the identity covers is compared once the source is built.
        if change.free or change.setting in before.identity or names(accepted, change.setting):
            continue
        if change.derived and change.before is not None:
            kept[change.setting] = change.before
            text = "%s: stays %s, as the run had it; by the new settings it would be %s (--accept %s)"
            logger.warning(text, change.setting, inline(change.before), inline(change.now), change.setting)
        else:
            faults.append(_fault(before, change.setting, inline(change.before), inline(change.now)))
    if faults:
        raise Faults(faults)
    lr = before.tables.get("train", {}).get("lr")
    if recipe.train.lr is None and lr is not None and SCHEDULE not in accepted and not names(accepted, LR):
        kept[LR] = lr  # the default goes by the steps, and by the version that began the run
    return kept


def _of_schedule(before: Before, recipe: Recipe) -> Iterator[Change]:
    """The steps that schedules go by, where they differ."""
    train = before.tables.get("train", {})
    old = train.get("schedule_steps", train.get("steps"))
    new = recipe.train.schedule_steps or recipe.train.steps
    if old != new:
        derived = recipe.train.schedule_steps is None
        yield Change(setting=SCHEDULE, before=old, now=new, free=False, derived=derived)


def _fault(before: Before, setting: str, old: str, new: str) -> Fault:
    old = "not set" if old == "None" else old
    new = "not set" if new == "None" else new
    text = f"differs from the run in {before.folder}: it was {_short(old)}, now it is {_short(new)}"
    return Fault(parse_path(setting), f"{text}; resume with what it was, or accept it: --accept {setting}")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:150]} ..."


def keep(recipe: Recipe, kept: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some settings, `table.key`.

    Raises:
        Refused: such a value does not fit the recipe.
    """
    by_table: dict[str, dict[str, Any]] = {}
    for setting, value in kept.items():
        table, _, key = setting.partition(".")
        by_table.setdefault(table, {})[key] = value
    for table, values in by_table.items():
        record = getattr(recipe, table)
        try:  # all at once: they are checked against each other
            if isinstance(record, Selected):
                record = attrs.evolve(record, config=attrs.evolve(record.config, **values))
            else:
                record = attrs.evolve(record, **values)
        except ValueError as error:
            settings = " ".join(f"--accept {table}.{key}" for key in values)
            text = f"{error}: with the run's {inline(values)}; accept the new ones: {settings}"
            raise Refused(table, text) from error
        recipe = attrs.evolve(recipe, **{table: record})
    return recipe


def identity_of(source: Source) -> dict[str, str]:
    """What a source's data are made from, by setting; nothing if it cannot tell."""
    return dict(source.identity()) if isinstance(source, Identified) else {}


def check_identity(before: Before, identity: Mapping[str, str], recipe: Recipe, accepted: Collection[str]) -> bool:
    """Compare the content of data; returns whether they are other data, accepted as such.

    Raises:
        Faults: they are others, and not accepted.
    """
    found = {change.setting: change for change in changes(before.tables, recipe)}
    faults: list[Fault] = []
    other = any(
        change.setting.split(".")[0] in DATA_TABLES and not change.free and change.setting not in before.identity
        for change in found.values()
    )
    for setting, old in before.identity.items():
        new = identity.get(setting)
        if new == old or (new is None and setting not in found):
            continue
        other = True
        if names(accepted, setting):
            continue
        if new is None:
            faults.append(_fault(before, setting, inline(found[setting].before), inline(found[setting].now)))
        else:
            text = f"its content is not that of the run in {before.folder}: it was {old}, now it is {new}"
            remedy = f"resume with what it was, or accept other data: --accept {setting}"
            faults.append(Fault(parse_path(setting), f"{text}; {remedy}"))
    if faults:
        raise Faults(faults)
    if other:
        logger.warning(
            "the source reads other data than the run in %s did: it starts at their beginning", before.folder
        )
    return other


def check_data_ranks(before: Before, source: Source, accepted: Collection[str]) -> None:
    """Whether rows are dealt as they were: transforms that drop rows keep as many of each data rank's.

    Raises:
        Refused: there are more or fewer data ranks, and that is not accepted.
    """
    if not isinstance(source, TransformedSource) or not source.drops or names(accepted, "transforms"):
        return
    old, new = before.data_ranks, source.parallel.data_ranks
    if old is not None and old != new:
        text = (
            "they drop rows, so batches depend on the number of data ranks: in the run in "
            f"{before.folder} it was {old}, now it is {new}; resume on as many, or accept it: --accept transforms"
        )
        raise Refused("transforms", text)
