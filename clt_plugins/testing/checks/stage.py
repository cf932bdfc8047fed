"""Checks for `[[stages]]`: see `clt_plugins.contract.results.stage.Stage`.

They use the first transcoder of `TRANSCODERS` that the stage accepts, saved and loaded, as a resumed run does. What it
`reads` is a random store of collected features.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any, Self
from unittest import SkipTest, mock

import attrs
import torch

from clt_plugins.contract.reading.source import HasModel
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.results.stage import Stage, StageInfo
from clt_plugins.errors import Faults, WrongReturn
from clt_plugins.files.folders import check_folder
from clt_plugins.finished.job import Job
from clt_plugins.finished.provenance import Provenance, identify, settings_of
from clt_plugins.finished.results import kept
from clt_plugins.finished.stages import Chosen, build_stage, run_stage
from clt_plugins.model.assemble import Parts
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import D_MODEL, FEATURES, LAYERS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, one_line, same
from clt_plugins.testing.stores import make_store

TRANSCODERS: tuple[dict[str, Any], ...] = (
    {"activation": {"name": "topk", "k": 8}},
    {"activation": {"name": "jumprelu", "threshold": 0.05}},
    {"activation": {"name": "relu"}},
)

MOST_WRITES = 20
"""So many files of a stage are tried."""


@attrs.frozen(eq=False)
class Ready:
    """A stage, and all that it needs to run."""

    chosen: Chosen
    job: Job
    recipe: Recipe
    target: Path
    """Where its result goes."""

    def again(self, **changes: Any) -> Job:
        return attrs.evolve(self.job, **changes)

    def run(self) -> CrossLayerTranscoder | None:
        return run_stage(self.chosen, self.job, self.target)[0]


def _built(bench: Bench, parts: Parts) -> tuple[Chosen, Recipe]:
    recipe = parts.context.recipe
    assert recipe is not None
    return build_stage(bench.selected(recipe), parts.context), recipe


def _job(bench: Bench, parts: Parts, chosen: Chosen, recipe: Recipe, **changes: Any) -> Job:
    reads = chosen.info.needs != "transcoder"
    settings: dict[str, Any] = {
        "transcoder": parts.transcoder,
        "source": parts.source if reads else None,
        "recipe": recipe,
        "context": parts.context,
        "plugins": bench.plugins,
        "folder": bench.folder / "run" / chosen.info.folder,
        "root": bench.folder / "run",
        "made_from": Provenance(transcoder=identify(bench.folder), settings={}),
        "show": lambda text, record: None,
        "log": lambda metrics: None,
    }
    return Job(**{**settings, **changes})


def _ready(bench: Bench) -> Ready:
    """The stage with a transcoder that it accepts."""
    reasons = []
    for number, tables in enumerate(TRANSCODERS):
        changes = {name: table for name, table in tables.items() if name not in bench.tables}
        try:
            parts = bench.parts(**changes)
            chosen, recipe = _built(bench, parts)
            if chosen.info.needs == "language_model" and not isinstance(parts.source, HasModel):
                raise SkipTest("it needs a language model: give `recipe` with a source that has one")
            chosen.stage.check(_job(bench, parts, chosen, recipe))
        except Faults as error:
            reasons.append(str(error))
            continue
        place = bench.folder / f"trained{number}" / "transcoder"
        parts.transcoder.step, parts.transcoder.tokens = 7, 7 * recipe.train.batch_tokens
        parts.transcoder.save(place)
        loaded = CrossLayerTranscoder.load(place, plugins=bench.plugins)
        made_from = Provenance(transcoder=identify(place), settings=settings_of(chosen.selected, chosen.info, recipe))
        for folder in chosen.info.reads:
            make_store(bench.folder / "run" / folder, layers=LAYERS, features=FEATURES, d_model=D_MODEL)
        job = _job(bench, parts, chosen, recipe, transcoder=loaded, made_from=made_from)
        return Ready(chosen, job, recipe, bench.folder / "run" / chosen.info.folder)
    return complain("a transcoder that the stage accepts", "; ".join(dict.fromkeys(reasons)), "`recipe` of the cases")


def _files(*folders: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*") if not file.is_dir()}


@check("stages", trial=True)
def run(bench: Bench) -> None:
    """`run` writes into `job.folder` only, and leaves the transcoder as it was; what it returns is as `info` says.

    The result is then complete, and not made again: its record says what it was made from.
    """
    ready = _ready(bench)
    chosen, transcoder = ready.chosen, ready.job.transcoder
    expect(isinstance(chosen.info, StageInfo), "`info`, a StageInfo", type(chosen.info).__name__, "`info`")
    before = {name: x.clone() for name, x in transcoder.tensors().items()}
    other = bench.folder / "working"
    other.mkdir()
    with contextlib.chdir(other):
        read = [bench.folder / "run" / folder for folder in chosen.info.reads]
        places = [*(path for path in bench.folder.iterdir() if path.name != "run"), *read]
        there = _files(*places)
        try:
            returned = ready.run()
        except WrongReturn as error:
            complain("what `info.returns_transcoder` says", str(error), "`run`: its return value")
        changed = [name for name, at in _files(*places).items() if there.get(name) != at]
    strayed = [str(path) for path in (bench.folder / "run").rglob("*") if not path.is_dir()]
    changed += [path for path in strayed if not any(map(Path(path).is_relative_to, (ready.target, *read)))]
    expect(not changed, "files in `job.folder` only", ", ".join(changed), "`run`: write into `job.folder`")
    for name, x in transcoder.tensors().items():
        same(x, before[name], f"{name} of the job's transcoder as it was", "`run`: work on a copy, and return it")
    expect(not transcoder.training, "the transcoder still in eval mode", "it is in training mode", "`run`")
    check_folder(ready.target)
    if returned is not None:
        loaded = CrossLayerTranscoder.load(ready.target, plugins=bench.plugins)
        x = bench.batch().inputs
        look = "`run`: what it returns has values that files do not hold"
        same(loaded(x), returned(x), "the returned transcoder, saved and loaded", look, 1e-4)
    expect(
        kept(ready.target, chosen.info.record, ready.job.made_from),
        f"{chosen.info.record} with `made_from`, so that a resumed run does not do it again",
        "another one, or none",
        "`run`: leave the record to the engine, or write `job.made_from` under the key `made_from`",
    )


@check("stages")
def before_training(bench: Bench) -> None:
    """`check` looks at choices and shapes only: it works on the device "meta", without a source, and writes nothing.

    With `returns_transcoder` it returns one, else nothing.
    """
    for device in ("meta", "cpu"):
        accepted, reasons = None, []
        for tables in TRANSCODERS:
            changes = {name: table for name, table in tables.items() if name not in bench.tables}
            try:
                parts = bench.parts(device=device, **changes)
                chosen, recipe = _built(bench, parts)
                job = _job(bench, parts, chosen, recipe, **({"source": None} if device == "meta" else {}))
                accepted = chosen, chosen.stage.check(job)
                break
            except Faults as error:
                reasons.append(str(error))
        if accepted is None:
            complain(f"`check` to accept a transcoder on {device}", "; ".join(reasons), "`recipe` of the cases")
        chosen, returned = accepted
        says = isinstance(returned, CrossLayerTranscoder)
        expect(
            says == chosen.info.returns_transcoder and (says or returned is None),
            "a transcoder from `check` where `info.returns_transcoder`, else None",
            type(returned).__name__,
            "`check`: what later stages will get",
        )
        left = _files(bench.folder)
        expect(not left, "no file from `check`", ", ".join(left), "`check`: it only looks")


@check("stages")
def broken_off(bench: Bench) -> None:
    """An error while it writes, of any one file, leaves `run`, so that no incomplete result counts as complete; the
    older one stays."""
    ready = _ready(bench)
    ready.run()
    older = {name: Path(name).read_bytes() for name in _files(ready.target)}
    made_from = attrs.evolve(ready.job.made_from, settings={"other": True})
    job = ready.again(made_from=made_from)
    for before in range(MOST_WRITES):
        disk = Failing(ready.chosen.stage, before)
        try:
            run_stage(attrs.evolve(ready.chosen, stage=disk), job, ready.target)
        except (OSError, RuntimeError) as error:
            now = {name: Path(name).read_bytes() for name in _files(ready.target)}
            expect(now == older, "the older result as it was", one_line(error), "`run`: it must not touch it")
            # What it wrote into `job.work` is there to go on from.
            work = f".{ready.target.name}.work"
            left = [path.name for path in ready.target.parent.glob(".*") if path.is_dir() and path.name != work]
            expect(not left, "nothing half written left", ", ".join(left), "`run`")
            continue
        expect(
            not disk.refused,
            "an error of any write to end `run`",
            f"{disk.refused} could not be opened for writing, and it went on: its result is incomplete",
            "`run`: an `except` or a `suppress` that swallows errors?",
        )
        if before == 0:
            raise SkipTest("it opens no file by Python's `open`: a disk that fails cannot be played to it")
        return


class Failing:
    """A stage on a disk that fails once."""

    def __init__(self, stage: Stage, files: int):
        self.info, self.check, self.stage, self.files = stage.info, stage.check, stage, files
        self.refused = ""
        """The file that could not be opened."""

    def run(self, job: Job) -> Any:
        disk = FailingDisk(job.folder, self.files)
        try:
            with disk:
                return self.stage.run(job)
        finally:
            self.refused = disk.refused


class FailingDisk(contextlib.ExitStack):
    """A disk that fails once: after so many files in a folder, opening the next one for writing does. Later ones are
    written again, so that an error which is swallowed is not followed by another one."""

    def __init__(self, folder: Path, files: int):
        super().__init__()
        self.folder, self.left = folder, files
        self.refused = ""
        """The file that could not be opened."""

    def __enter__(self) -> Self:
        real = io.open

        def limited(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            name = os.fspath(file) if isinstance(file, str | os.PathLike) else ""
            if set(mode) & set("wax+") and str(name).startswith(str(self.folder)):
                self.left -= 1
                if self.left == -1:
                    self.refused = str(Path(str(name)).relative_to(self.folder))
                    raise OSError(errno.ENOSPC, "No space left on device", str(name))
            return real(file, mode, *arguments, **options)

        self.enter_context(mock.patch.object(builtins, "open", limited))
        self.enter_context(mock.patch.object(io, "open", limited))
        return super().__enter__()


@check("stages")
def repeatable(bench: Bench) -> None:
    """Run twice, from the same position of the source, it returns the same transcoder: later results depend on it."""
    ready = _ready(bench)
    if not ready.chosen.info.returns_transcoder:
        raise SkipTest("it returns no transcoder")
    state = ready.job.source.state() if ready.job.source is not None else None
    first = ready.run()
    torch.rand(3)
    if state is not None:
        ready.job.source.load_state(state)
    second = ready.run()
    assert first is not None and second is not None
    again = second.tensors()
    for name, x in first.tensors().items():
        same(again[name], x, f"{name} as of the first time", "`run`: torch's own random numbers? Use `generator`")
