"""A sweep from its recipe to the frontier. `python -m clt_plugins sweep RECIPE --out DIR` and `clt_plugins.sweep`.

```text
DIR/sweep.json              the members: label, settings, stream
DIR/k=32,seed=0/            the run's folder of each, as `run` makes it: `run --resume` goes on with it alone
DIR/evaluations/LABEL/      scores of members whose recipe has no stage `evaluate`
DIR/frontier.json .html .png
```
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.distributed.signals import Signals, heard
from clt_plugins.errors import ExitCode, Refused, Stopped
from clt_plugins.files.atomic import write_file
from clt_plugins.files.records import FORMAT, json_text
from clt_plugins.files.untrusted import load_json
from clt_plugins.model.assemble import make_context
from clt_plugins.model.devices import make_device
from clt_plugins.model.scores import score
from clt_plugins.recipe.read import read_sweep
from clt_plugins.recipe.sweep import Sweep
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.training.host.free import available_bytes
from clt_plugins.training.host.memory import kept_memory
from clt_plugins.training.sweep.folder import RECORD, sweep_folder
from clt_plugins.training.sweep.memory import most_at_once, plan_sweep
from clt_plugins.training.sweep.result import frontier as result
from clt_plugins.training.sweep.result.frontier import Frontier, Point
from clt_plugins.training.sweep.result.page import page
from clt_plugins.training.sweep.result.picture import draw
from clt_plugins.training.sweep.streams import Group, grouped
from clt_plugins.training.sweep.turn import Turn
from clt_plugins.training.sweep.turns import Together

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Listed:
    """A member in `sweep.json`."""

    label: str
    settings: dict[str, Any]
    stream: int
    """Members with the same number read the same batches."""


@attrs.frozen(kw_only=True)
class Record:
    """The content of `sweep.json`, written at every start."""

    format: int = FORMAT
    """The version of this file."""
    name: str
    """The recipe's."""
    keys: list[str]
    """The settings that differ between members."""
    members: list[Listed]


def sweep(
    recipe: str | Path | Mapping[str, Any] | Sweep,
    *,
    out: str | Path,
    resume: bool = False,
    accept: Collection[str] = (),
    at_once: int | None = None,
    plugins: Plugins | None = None,
) -> Frontier:
    """Train all transcoders that a recipe with `[sweep]` describes, those on the same activations in turns; then score
    them.

    Args:
        recipe: a recipe file, or its tables as a dictionary.
        out: the sweep's folder; each member has a run's folder in it.
        resume: go on from the latest checkpoint of each member in `out`; members that have none begin.
        accept: see `run`.
        at_once: members that are trained at a time; more need more memory, fewer read the activations more often. None:
            all of a stream.

    Returns:
        Scores of all members, those on the frontier marked; also saved in `out/frontier.json`.

    Raises:
        Faults: the recipe has faults, or something that it names does not fit or is not there; or memory is too small.
        Stopped: interrupted, or members failed: the others are complete.
    """
    _check_alone()
    plugins = plugins or load_plugins()
    read = recipe if isinstance(recipe, Sweep) else read_sweep(recipe, plugins=plugins)
    if read is None:
        raise Refused("sweep", 'missing: this recipe is of one transcoder, "run" trains it; list values in [sweep]')
    if at_once is not None and at_once < 1:
        raise Refused("--at-once", f"must be at least 1: {at_once}")
    root = Path(out)
    with heard() as signals:
        _check_memory(read, plugins, at_once)
        with sweep_folder(root, resume, {member.label for member in read.members}):
            return _run(read, root, resume, accept, at_once, plugins, signals)


def _check_alone() -> None:
    """
    Raises:
        Refused: `torchrun` has started several processes: each would train all members.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        text = f"trains in one process, and {started} were started: leave out torchrun"
        raise Refused(
            "sweep", f"{text}; for more GPUs start a sweep for each, with some of the values and its own --out"
        )


def _check_memory(read: Sweep, plugins: Plugins, at_once: int | None) -> None:
    """Before anything is built, plan all members.

    Raises:
        Faults: one of them cannot be trained, or not in one process; or the device has too little memory for all at a
            time. Where the user has said how many are trained at a time, that is only a warning.
    """
    needs = plan_sweep(read, plugins, at_once)
    if any(one.needs.ranks > 1 for one in needs.members):
        text = 'a sweep trains in one process: take parallel = "single", and for more GPUs start a sweep for each'
        raise Refused("parallel", text)
    device = make_device(read.members[0].recipe.transcoder.device)
    available = available_bytes(device)
    if available is None or needs.total_bytes <= available:
        return
    told = f"needs {needs.total_bytes / 1e9:.1f} GB by plan, of {available / 1e9:.1f} GB that are free on {device}"
    if at_once is not None:
        logger.warning("the sweep %s", told)
        return
    most = most_at_once(read, needs, available)
    if most is None:
        raise Refused("sweep", f"{told}, and not one of its members fits: see `plan`, or try with --at-once 1")
    passes = len(grouped(read.members, most))
    raise Refused("sweep", f"{told}: train {most} at a time, --at-once {most} (activations are made {passes} times)")


def _run(
    read: Sweep,
    root: Path,
    resume: bool,
    accept: Collection[str],
    at_once: int | None,
    plugins: Plugins,
    signals: Signals,
) -> Frontier:
    groups = grouped(read.members, at_once)
    streams = {member.label: group.stream for group in groups for member in group.members}
    listed = [Listed(label=one.label, settings=one.settings, stream=streams[one.label]) for one in read.members]
    name = read.members[0].recipe.name
    points: dict[str, Point] = {}
    for number, group in enumerate(groups):
        if len(groups) > 1:
            logger.info("group %d of %d: %s", number + 1, len(groups), ", ".join(one.label for one in group.members))
        for point in _group(
            group,
            root,
            resume,
            accept,
            plugins,
            signals,
            lambda: write_file(root / RECORD, json_text(Record(name=name, keys=read.keys, members=listed)) + "\n"),
        ):
            points[point.label] = point
    frontier = result.frontier(name, read.keys, [points[member.label] for member in read.members])
    write(frontier, root)
    logger.info("%s", result.as_text(frontier))
    failed = [point for point in frontier.members if point.status == "failed"]
    if failed:
        told = "; ".join(f"{point.label}: {point.error}" for point in failed)
        guard = all(isinstance(point.error, str) and "not finite" in point.error for point in failed)
        text = f"{len(failed)} of {len(frontier.members)} members failed, the others are complete: {told}"
        raise Stopped(ExitCode.GUARD if guard else ExitCode.FAILED, text)
    return frontier


def _group(
    group: Group,
    root: Path,
    resume: bool,
    accept: Collection[str],
    plugins: Plugins,
    signals: Signals,
    begun: Any,
) -> Iterator[Point]:
    """Train some members, and yield their scores.

    Args:
        begun: called when all that can be refused has been tried.
    """
    with ExitStack() as stack:
        context = make_context(group.members[0].recipe)
        parallel = context.parallel
        stack.callback(parallel.close)
        stack.enter_context(kept_memory(context.device))
        together = Together(stack, group.members, root, parallel, plugins, resume=resume, accepted=accept)
        begun()
        signals.phase = "interrupted at once: the last checkpoints are complete, go on with --resume"
        together.train(stack, signals)
        signals.phase = f"interrupted after training: the transcoders in {root} are saved, --resume does the rest"
        if signals.asked:
            raise Stopped(ExitCode.INTERRUPTED, signals.phase)
        done = {}
        for turn in together.finish():
            done[turn.member.label] = _point(turn)
        for turn in together.turns:
            yield done.get(turn.member.label) or Point(
                label=turn.member.label,
                settings=turn.member.settings,
                status="failed",
                error=turn.error,
            )


def _point(turn: Turn) -> Point:
    """A trained member's scores: of its report, or, without one, those of the held-out tokens."""
    one = turn.one
    assert one is not None and one.series is not None
    if turn.report.is_file():
        scores = result.scores_of(load_json(turn.report))
    else:
        tokens = one.recipe.train.eval_tokens
        scored = score(one.series.loaded(), one.parts.source.held_out(tokens))
        scores = result.scores_of({name: getattr(scored, name) for name in ("l0", "nmse", "dead_fraction")})
    return Point(
        label=turn.member.label,
        settings=turn.member.settings,
        status="trained",
        step=one.progress.step,
        tokens=one.progress.tokens,
        **scores,  # type: ignore[arg-type]
    )


def write(frontier: Frontier, root: Path) -> Sequence[Path]:
    """Write the frontier as JSON, a page, and a picture where matplotlib is installed; returns the files.

    Raises:
        OSError: one could not be written.
    """
    files = [root / result.FILE, root / "frontier.html"]
    write_file(files[0], json_text(frontier) + "\n")
    write_file(files[1], page(frontier))
    picture = root / "frontier.png"
    if draw(frontier, picture):
        files.append(picture)
    else:
        logger.warning("no frontier.png: it needs matplotlib (pip install 'clt-plugins[plots]')")
    return files
