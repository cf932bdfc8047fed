"""Memory of a sweep, before it starts: that of all members that are trained at a time, and of one source.

What a member holds between its steps (weights, gradients, moments) is there for all of them; what a step makes, only
for the one that has its turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch

from clt_plugins.errors import Fault, Faults
from clt_plugins.files.records import as_data
from clt_plugins.training.plan.build import plan
from clt_plugins.training.plan.memory import LASTING, PHASES
from clt_plugins.training.plan.records import Plan
from clt_plugins.training.sweep.stream import HELD
from clt_plugins.training.sweep.streams import Group, grouped

if TYPE_CHECKING:
    from clt_plugins.recipe.sweep import Member, Sweep
    from clt_plugins.registry.plugins import Plugins

SHARED = ("source", "language_model", "libraries")
"""Parts of the memory that are there once for all members."""
PASS = ("language model", "data")
"""Parts of a step that are the source's, and done once for all members."""


@attrs.frozen(kw_only=True)
class Planned:
    """What a member needs by itself."""

    label: str
    stream: int
    """Which of the streams it reads; members with the same number share one."""
    needs: Plan
    """As a run alone."""


@attrs.frozen(kw_only=True)
class SweepPlan:
    """What a sweep needs."""

    members: list[Planned]
    streams: int
    """How many streams of activations there are."""
    passes: int
    """How often a stream is read from its beginning: once for each group of members that are trained at a time."""
    total_bytes: int
    """Memory at the peak, of the group that needs most."""
    shared_bytes: int
    """What is there once for all members of a group: the source, the language model, batches that wait."""
    host_bytes: int
    """Memory of the CPU that the source keeps its activations in, if they are not on the device."""
    disk_bytes: int
    """All members' folders at their fullest."""
    seconds: float | None = None
    """Of all training steps, where a device is given or measured."""
    seconds_alone: float | None = None
    """The same of runs alone, one after the other."""
    fits: bool | None = None
    """Whether the device's memory holds it; None if that is not known."""
    most_at_once: int | None = None
    """How many members at a time it holds, if that is known and it holds one."""


def plan_sweep(
    sweep: Sweep, plugins: Plugins, at_once: int | None = None, of: Callable[[Member], Plan] | None = None
) -> SweepPlan:
    """What a sweep needs.

    Args:
        at_once: members that are trained at a time; None: all of a stream.
        of: the plan of a member.

    Raises:
        Faults: training a member, or the stages after it, would fail.
    """
    plans: dict[str, Plan] = {}
    faults: list[Fault] = []
    for member in sweep.members:
        try:
            plans[member.label] = of(member) if of is not None else plan(member.recipe, plugins)
        except Faults as error:
            faults += [attrs.evolve(one, text=f"{one.text} (member {member.label})") for one in error.faults]
    if faults:
        raise Faults(faults)
    groups = grouped(sweep.members, at_once)
    largest = max(groups, key=lambda group: _bytes(group, plans))
    seconds = [plans[member.label].speed for member in sweep.members]
    known = [speed for speed in seconds if speed is not None]
    return SweepPlan(
        members=[
            Planned(label=member.label, stream=group.stream, needs=plans[member.label])
            for group in groups
            for member in group.members
        ],
        streams=groups[-1].stream + 1,
        passes=len(groups),
        total_bytes=_bytes(largest, plans),
        shared_bytes=_shared(largest, plans),
        host_bytes=max(one.host_bytes for one in plans.values()),
        disk_bytes=sum(one.disk.run for one in plans.values()),
        seconds=sum(_seconds(group, plans) for group in groups) if len(known) == len(plans) else None,
        seconds_alone=sum(speed.hours * 3600 for speed in known) if len(known) == len(plans) else None,
    )


def _bytes(group: Group, plans: dict[str, Plan]) -> int:
    """Memory of a group at the peak."""
    parts = [as_data(plans[member.label].bytes) for member in group.members]
    own = sum(sum(each[name] for name in LASTING if name not in SHARED) for each in parts)
    step = max(sum(each[name] for name in phase) for each in parts for phase in PHASES)
    return own + step + _shared(group, plans)


def _shared(group: Group, plans: dict[str, Plan]) -> int:
    """What is there once, with batches that wait for members."""
    parts = [as_data(plans[member.label].bytes) for member in group.members]
    once = sum(max(each[name] for each in parts) for name in SHARED)
    first, train = plans[group.members[0].label], group.members[0].recipe.train
    numbers = 2 * train.batch_tokens * first.n_layers * first.d_model
    return once + (HELD if len(group.members) > 1 else 0) * numbers * torch.float32.itemsize


def _seconds(group: Group, plans: dict[str, Plan]) -> float:
    """Of all steps of a group: the source's part of the longest of them once, and the others of each."""
    total, source = 0.0, 0.0
    for member in group.members:
        speed, steps = plans[member.label].speed, member.recipe.train.steps
        assert speed is not None
        of_source = sum(piece.seconds for piece in speed.last.pieces if piece.name in PASS)
        total += steps * max(0.0, speed.seconds - of_source)
        source = max(source, steps * of_source)
    return total + source


def most_at_once(sweep: Sweep, plans: SweepPlan, available: int) -> int | None:
    """How many members can be trained at a time in so much memory; None if not one."""
    by_label = {one.label: one.needs for one in plans.members}
    for count in range(len(sweep.members), 0, -1):
        if all(_bytes(group, by_label) <= available for group in grouped(sweep.members, count)):
            return count
    return None


def as_table(needs: SweepPlan) -> str:
    """A plan of a sweep, for people."""
    lines = [f"{len(needs.members)} transcoders on {_count(needs.streams, 'stream')} of activations"]
    for one in needs.members:
        own, disk = one.needs.total_bytes / 2**30, one.needs.disk.run / 1e9
        lines.append(
            f"  {one.label}: parameters {one.needs.parameters:,}, memory alone {own:.3f} GiB, disk {disk:,.1f} GB"
            + (f", stream {one.stream + 1}" if needs.streams > 1 else "")
        )
    lines += [
        f"memory {needs.total_bytes / 2**30:.3f} GiB at a time, {needs.shared_bytes / 2**30:.3f} of it shared",
        *([f"  and on the CPU {needs.host_bytes / 2**30:.3f} GiB"] if needs.host_bytes else []),
        f"disk {needs.disk_bytes / 1e9:,.1f} GB",
        f"activations are made {_count(needs.passes, 'time')} instead of {len(needs.members)}",
    ]
    if needs.seconds is not None and needs.seconds_alone is not None:
        lines.append(f"time {_time(needs.seconds)}; {_time(needs.seconds_alone)} for the same runs one after the other")
    else:
        lines.append("times: --gpu NAME, or --measure here")
    if needs.fits is False:
        remedy = f"train {needs.most_at_once} at a time, --at-once" if needs.most_at_once else "not even one does"
        lines.append(f"does not fit: {remedy}{f' {needs.most_at_once}' if needs.most_at_once else ''}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """Hours, minutes or seconds."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} seconds"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
