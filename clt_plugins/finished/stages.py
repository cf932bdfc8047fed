"""The stages of a recipe: built, checked before training, and run one after the other.

Each writes a folder atomically. A stage whose result is there, made from the same transcoder with the same settings, is
not run again. Otherwise the old result stays until the new one is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.reading.source import HasModel
from clt_plugins.contract.results.stage import Stage, StageInfo
from clt_plugins.errors import Fault, Faults, Refused, Stopped, Where, WrongReturn
from clt_plugins.files.atomic import remove
from clt_plugins.files.records import FORMAT, write_json
from clt_plugins.finished.job import Job
from clt_plugins.finished.provenance import Origin, Provenance, settings_of
from clt_plugins.finished.results import ReportLoggers, replacing
from clt_plugins.model.saved.description import put_transcoder
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.spec import Selected
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Record:
    """What a result was made from; the content of `StageInfo.record` where the stage does not write that itself."""

    format: int = FORMAT
    """The version of this file."""
    made_from: Provenance
    """The transcoder, and the settings."""


@attrs.frozen(kw_only=True, eq=False)
class Chosen:
    """A stage, built, and the choice that it comes from."""

    selected: Selected
    stage: Stage
    index: int | None = None
    """Its number in the recipe; None where a command runs it alone."""

    @property
    def info(self) -> StageInfo:
        return self.stage.info

    def __str__(self) -> str:
        return f"stage {self.selected.name!r}" if self.index is None else f"stages[{self.index}] {self.selected.name!r}"

    @contextmanager
    def faults_located(self) -> Iterator[None]:
        """Faults of `stages.NAME.setting` are those of `stages[1].setting`, so that they have a line in the recipe."""
        try:
            yield
        except Faults as error:
            own: Where = ("stages", self.selected.name)
            if self.index is None or not any(fault.where[:2] == own for fault in error.faults):
                raise
            path: Where = ("stages", self.index)
            raise Faults(
                attrs.evolve(one, where=(*path, *one.where[2:])) if one.where[:2] == own else one
                for one in error.faults
            ) from error


def build_stage(selected: Selected, context: Context, index: int | None = None) -> Chosen:
    """Build a stage.

    Raises:
        Faults, PluginError: see `build`; or it says nothing of itself.
    """
    stage: Stage = build(selected, context)
    if not isinstance(stage.info, StageInfo):
        raise WrongReturn(stage, f"{selected.name}.info must be a StageInfo, got {type(stage.info).__name__}")
    return Chosen(selected=selected, stage=stage, index=index)


def check_stages(parts: Parts, recipe: Recipe, plugins: Plugins, *, data: bool = True) -> list[Chosen]:
    """Build the recipe's stages, and before training refuse settings that would make training or one of them fail.

    Args:
        parts: as built; the transcoder may be on the device "meta".
        data: whether the source is there, to be asked for held-out rows.

    Raises:
        Faults: all of them.
    """
    transcoder, source = parts.transcoder, parts.source
    faults: list[Fault] = []
    stages: list[Chosen] = []
    for index, selected in enumerate(recipe.stages):
        with _collected(faults):
            stages.append(build_stage(selected, parts.context, index))
    faults += _conflicts(stages, recipe, parts.context.parallel)
    # Training needs held-out text too. A plan alone (device "meta") does not ask for it, since a source may have to
    # run a language model to answer.
    reads = any(chosen.info.needs != "transcoder" for chosen in stages)
    if data and (reads or transcoder.device.type != "meta"):
        with _collected(faults):
            check_held_out(source)
    current: CrossLayerTranscoder | None = transcoder
    for chosen in stages:
        needs = chosen.info.needs
        if current is None and needs == "transcoder":
            continue  # what it would get is not known
        with _collected(faults), chosen.faults_located():
            job = Job(
                transcoder=current or transcoder,
                source=source if data and needs != "transcoder" else None,  # type: ignore[arg-type]
                recipe=recipe,
                context=parts.context,
                plugins=plugins,
                folder=(parts.context.folder or Path()) / chosen.info.folder,
                root=parts.context.folder,
                made_from=Provenance(
                    transcoder=Origin(folder="transcoder"), settings=settings_of(chosen.selected, chosen.info, recipe)
                ),
                show=lambda text, record: None,
                log=lambda metrics: None,
            )
            if needs == "language_model" and data:
                _check_model(chosen, source)
            before = len(faults)
            returned = None
            with _collected(faults), chosen.faults_located():
                returned = chosen.stage.check(job)
            if chosen.info.returns_transcoder:
                current = returned if len(faults) == before else None
    if faults:
        raise Faults(faults)
    return stages


@contextmanager
def _collected(faults: list[Fault]) -> Iterator[None]:
    try:
        yield
    except Faults as error:
        faults += error.faults


def _check_model(chosen: Chosen, source: Source) -> None:
    if not isinstance(source, HasModel):
        raise Refused(
            f"stages.{chosen.selected.name}",
            'needs the language model, and the source has none: use one that has, such as "stream", or leave it out',
        )


def _conflicts(stages: Sequence[Chosen], recipe: Recipe, parallel: Parallel) -> Iterator[Fault]:
    """What the stages of a recipe cannot do together, or in this run."""
    for number, chosen in enumerate(stages):
        where: Where = ("stages", chosen.index or 0)
        path = PurePosixPath(chosen.info.folder)
        for other in stages[:number]:
            theirs = PurePosixPath(other.info.folder)
            if path == theirs or path in theirs.parents or theirs in path.parents:
                text = f"writes {path}/, and {other} writes {theirs}/: give one of them another folder"
                yield Fault(where, f"{chosen.selected.name!r} {text}")
        for folder in chosen.info.reads:
            writer = next((other for other in stages[:number] if other.info.folder == folder), None)
            if writer is None:
                text = f"reads {folder}/, which no stage before it writes: put the stage that does before it"
                yield Fault(where, f"{chosen.selected.name!r} {text}")
            elif chosen.info.every is not None and (not writer.info.every or chosen.info.every % writer.info.every):
                text = f"reads {folder}/, which {writer} does not write at each of these steps: give it the same"
                yield Fault((*where, "every"), text)
        if chosen.info.ranks == "all" and (one := next((s for s in stages[:number] if s.info.ranks == "one"), None)):
            text = f"runs on all ranks, and {one} before it on one: put it first"
            yield Fault(where, f"{chosen.selected.name!r} {text}")
        every, saved = chosen.info.every, recipe.train.checkpoint_every
        if every is not None and every % saved:
            text = f"{every} is no multiple of train.checkpoint_every ({saved}): it runs on checkpoints"
            yield Fault((*where, "every"), text)
        elif every is not None and parallel.world > 1 and chosen.info.ranks == "one" and _reads(chosen):
            text = f"{chosen.selected.name!r} runs on one rank, but during training {parallel.world} read the source"
            yield Fault((*where, "every"), f"{text}: leave it out (train.eval_every scores on all ranks)")


def _reads(chosen: Chosen) -> bool:
    return chosen.info.needs != "transcoder"


def check_fits(transcoder: CrossLayerTranscoder, source: Source) -> None:
    """Refuse a source whose activations a transcoder cannot read.

    Raises:
        Refused: the numbers of layers or the widths differ.
    """
    has, needs = (source.n_layers, source.d_model), (transcoder.n_layers, transcoder.d_model)
    if has != needs:
        raise Refused(
            "source",
            f"has {has[0]} layers of d_model {has[1]}, but the transcoder is for {needs[0]} layers of "
            f"d_model {needs[1]}: name the language model and layers that it was trained on",
        )


def check_held_out(source: Source) -> None:
    """Refuse a source that holds out no text.

    Raises:
        Refused: it holds out fewer than two tokens.
    """
    if sum(batch.tokens for batch in source.held_out(2)) < 2:
        raise Refused("source", "holds out no text, without which nothing can be converted or evaluated: hold out some")


def run_stage(
    chosen: Chosen,
    job: Job,
    folder: Path,
    *,
    parallel: Parallel | None = None,
    log: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[CrossLayerTranscoder | None, list[Exception]]:
    """Run a stage; its result is in `folder` when it is complete.

    Args:
        job: its folder does not matter.
        parallel: the ranks that run it, if not this one alone.
        log: where metrics go; to loggers of the recipe that write into the folder if it is None.

    Returns:
        What the stage returned; and what went wrong in loggers, for the caller to raise at the end: the result is
        complete without them.

    Raises:
        Faults, Unreachable: see `Stage.run`.
        OSError: the result could not be written.
    """
    info, transcoder = chosen.info, job.transcoder
    if _reads(chosen):
        check_fits(transcoder, job.source)
        check_held_out(job.source)
    if info.needs == "language_model":
        _check_model(chosen, job.source)
    transcoder.eval()
    origin = job.made_from.transcoder
    aside = (info.record, origin) if info.keeps_older else None
    returned: CrossLayerTranscoder | None = None
    target = folder.resolve()
    work = target.with_name(f".{target.name}.work")
    with replacing(folder, report=aside, parallel=parallel) as partial, chosen.faults_located():
        context = attrs.evolve(job.context, folder=partial)
        lead = parallel is None or parallel.rank == 0
        loggers = ReportLoggers(job.recipe if lead else None, context, origin.step)
        status = "failed"
        try:
            own = attrs.evolve(job, folder=partial, work=work, context=context, log=log or loggers.log)
            returned = chosen.stage.run(own)
            if (returned is not None) != info.returns_transcoder:
                got = "nothing" if returned is None else type(returned).__name__
                raise WrongReturn(
                    chosen.stage,
                    f"{chosen}: with returns_transcoder = {info.returns_transcoder}, "
                    f"run must return {'one' if info.returns_transcoder else 'None'}, got {got}",
                )
            if returned is not None:
                put_transcoder(returned, partial)
            if lead and not (partial / info.record).exists():
                write_json(partial / info.record, Record(made_from=job.made_from))
            status = "finished"
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        finally:
            loggers.close(status)
    if lead and work.is_dir():
        remove(work)
    return returned, loggers.failures
