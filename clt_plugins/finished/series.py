"""The stages of a run, in their order: those after training, and those that are due at a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.distributed.transformed import alone as reading_alone
from clt_plugins.errors import Stopped
from clt_plugins.files.steps import step_name
from clt_plugins.finished.job import Job
from clt_plugins.finished.provenance import Provenance, identify, results_read, settings_of
from clt_plugins.finished.results import kept
from clt_plugins.finished.stages import Chosen, run_stage
from clt_plugins.model.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.assemble import Parts
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, Any]], None]


@attrs.define(eq=False, kw_only=True)
class Series:
    """Stages run one after the other: each gets the transcoder that the last one returned.

    Results of other stages, and what users put there, stay.
    """

    root: Path
    """The folder that results go below."""
    path: Path
    """The folder of the transcoder that the next stage gets."""
    transcoder: CrossLayerTranscoder | None = None
    """That transcoder; None until it is needed."""
    parts: Parts
    recipe: Recipe
    plugins: Plugins
    parallel: Parallel | None = None
    """The ranks that run them, if not this one alone."""
    log: Log | None = None
    """Where metrics go; to loggers of each result if it is None."""
    failures: list[Exception] = attrs.field(factory=list)
    """What went wrong in loggers."""
    quiet: bool = False
    """Whether the user is not told of results."""

    def loaded(self) -> CrossLayerTranscoder:
        """The transcoder that the next stage gets."""
        if self.transcoder is None:
            device = str(self.parts.context.device)
            self.transcoder = CrossLayerTranscoder.load(self.path, device=device, plugins=self.plugins)
        return self.transcoder

    def run(self, chosen: Chosen) -> None:
        """Run a stage, unless its result stands.

        Raises:
            Exception: what the stage raised. Results of earlier ones are complete.
        """
        target = self.root / chosen.info.folder
        settings = settings_of(chosen.selected, chosen.info, self.recipe) | results_read(self.root, chosen.info)
        made_from = Provenance(transcoder=identify(self.path), settings=settings)
        stands = _agreed(self.parallel, kept(target, chosen.info.record, made_from))
        if stands and not self.quiet:
            logger.info("%s: kept, it was made from this transcoder with these settings", target)
        returned: CrossLayerTranscoder | None = None
        if not stands:
            job = Job(
                transcoder=self.loaded(),
                source=self.parts.source if chosen.info.needs != "transcoder" else None,  # type: ignore[arg-type]
                recipe=self.recipe,
                context=self._context(),
                plugins=self.plugins,
                folder=target,
                root=self.root,
                made_from=made_from,
                show=lambda text, record: None if self.quiet else logger.info("%s", text),
                log=lambda metrics: None,
            )
            try:
                returned, failures = run_stage(chosen, job, target, parallel=self.parallel, log=self.log)
            except Exception:
                logger.error("%s failed; results of other stages stay", chosen)
                raise
            self.failures += failures
            if not self.quiet:
                logger.info("%s: written by %s", target, chosen)
        if chosen.info.returns_transcoder:
            self.path, self.transcoder = target, returned

    def _context(self) -> Context:
        context = self.parts.context
        if self.parallel is None and context.parallel.world > 1:
            context = attrs.evolve(context, parallel=self.loaded().context.parallel)
        return context


def _agreed(parallel: Parallel | None, stands: bool) -> bool:
    """Rank 0's answer, on all."""
    return stands if parallel is None or parallel.world == 1 else parallel.gather(str(stands))[0] == "True"


class AtCheckpoints:
    """The stages that also run during training, each on the checkpoint just written.

    They read a copy of the transcoder from the checkpoint, unless they run on all ranks. The source and torch's random
    numbers are put back to where they stood, so training goes on as without them.

    A stage that fails does not end training: that is said at once, and raised when the run ends. On all ranks it ends
    the run, since ranks may no longer be in step; the checkpoint is complete.
    """

    def __init__(self, stages: Sequence[Chosen], folder: Path, parts: Parts, recipe: Recipe, plugins: Plugins) -> None:
        self.stages = [chosen for chosen in stages if chosen.info.every is not None]
        self.folder, self.parts, self.recipe, self.plugins = folder, parts, recipe, plugins
        self.failures: list[Exception] = []

    def __call__(self, step: int, log: Log) -> None:
        """Run what is due at a step whose checkpoint is written. At the last step all stages run anyway."""
        due = [chosen for chosen in self.stages if step % (chosen.info.every or 1) == 0]
        if not due or not 0 < step < self.recipe.train.steps:
            return
        source, parallel = self.parts.source, self.parts.context.parallel
        together = [chosen for chosen in due if chosen.info.ranks == "all"] if parallel.world > 1 else []
        alone = [chosen for chosen in due if chosen not in together]
        state = source.state()
        device = self.parts.context.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._run(together, step, log, parallel)
            if parallel.rank == 0:
                try:
                    with reading_alone(source):
                        self._run(alone, step, log, None)
                except (KeyboardInterrupt, Stopped):
                    raise
                except Exception as error:
                    text = "training goes on, and the run ends with this error"
                    logger.error("step %s: %s; %s", step, " ".join(str(error).split()), text)
                    self.failures.append(error)
        if source.state() != state:
            source.load_state(state)
        if parallel.world > 1:
            parallel.barrier()

    def _run(self, stages: Sequence[Chosen], step: int, log: Log, parallel: Parallel | None) -> None:
        if not stages:
            return
        live = self.parts.transcoder if parallel is not None else None
        series = Series(
            root=self.folder / "stages" / step_name(step),
            path=self.folder / "checkpoints" / step_name(step),
            transcoder=live,
            parts=self.parts,
            recipe=self.recipe,
            plugins=self.plugins,
            parallel=parallel,
            log=log,
        )
        try:
            for chosen in stages:
                series.run(chosen)
        finally:
            if live is not None:
                live.train()
