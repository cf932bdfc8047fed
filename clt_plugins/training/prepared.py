"""A run from the moment when all is built to its end, in the pieces in which several runs can take turns.

```text
Prepared      optimizer, schedule, and what the data are made from
load          from a checkpoint; a run that begins has its statistics fitted instead (`model/normalisation/fit`)
ready         callbacks start, plugins' state: all that can fail before the folder is changed
steps         the folder's records, loggers, the training loop, the trained transcoder
together      the stages that all ranks run
alone         the stages that rank 0 runs
```

`run` drives one of them, a sweep many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs
import torch

from clt_plugins.distributed.agree import all_or_none, anyone
from clt_plugins.distributed.generators import set_generators
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.finished.results import raise_first
from clt_plugins.finished.series import AtCheckpoints, Series
from clt_plugins.model.parameters import is_matrix
from clt_plugins.model.saved.description import save_transcoder
from clt_plugins.model.sparse import release_gradients, reuse_gradients
from clt_plugins.recipe.changes import changes
from clt_plugins.recipe.read import as_toml, recipe_data
from clt_plugins.registry.build import build
from clt_plugins.training import learned
from clt_plugins.training.between.calls import Calls
from clt_plugins.training.loop import train
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.rate import with_rate
from clt_plugins.training.saved.checkpoint import Progress, load_checkpoint, load_plugins_state, set_aside
from clt_plugins.training.saved.history import Start, record_start
from clt_plugins.training.saved.resume import check_data_ranks, check_identity, identity_of
from clt_plugins.training.warm_start import warm_start

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.logger import Logger
    from clt_plugins.contract.results.scores import Scores
    from clt_plugins.finished.stages import Chosen
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


class Prepared:
    """A run whose parts are built and checked; its folder is this process's.

    Args:
        accepted: settings that may differ from those of the checkpoint.
        stages: of the recipe, checked.
    """

    def __init__(
        self, parts: Parts, start: Start, accepted: Collection[str], plugins: Plugins, stages: Sequence[Chosen]
    ):
        self.parts, self.start, self.accepted, self.plugins, self.stages = parts, start, accepted, plugins, stages
        transcoder, context = parts.transcoder, parts.context
        rate = with_rate(start.recipe.train, transcoder.n_layers * transcoder.n_features)
        self.recipe: Recipe = attrs.evolve(start.recipe, train=rate)
        own = {id(p) for p in transcoder.parameters()}
        extra = {name: p for name, p in learned.parameters(parts).items() if id(p) not in own}
        self.optimizer = make_optimizer(transcoder, self.recipe, extra)
        self.schedule = build(self.recipe.schedule, attrs.evolve(context, recipe=self.recipe))
        idle = torch.zeros(transcoder.shape, dtype=torch.int64, device=context.device)
        self.progress = Progress(step=0, tokens=0, idle_tokens=idle)
        self.identity, self.source_anew = _data(parts, start, accepted)
        with all_or_none(context.parallel):
            self.warm = warm_start(parts, start.recipe, plugins) if start.checkpoint is None else None
        self.calls: Calls | None = None
        self.at_checkpoints = AtCheckpoints(stages, start.folder, parts, self.recipe, plugins)
        self.scores: Scores | None = None
        """The last held-out scores of this process; None if no step was left."""
        self.series: Series | None = None
        """The stages, once training is over."""

    @property
    def begins(self) -> bool:
        """Whether it begins at its first step: then its statistics are to be fitted."""
        return self.start.checkpoint is None

    @property
    def needs_statistics(self) -> bool:
        """Whether a run that begins has its statistics fitted; one with `transcoder.from` may have them from there."""
        return self.warm is None or self.warm.needs_statistics

    def begin(self) -> None:
        """Take the weights that `transcoder.from` names, once the statistics are fitted."""
        if self.warm is not None:
            with all_or_none(self.parts.context.parallel):
                self.warm.begin()

    def load(self) -> None:
        """Go on from the checkpoint; it holds the statistics, and fitting again would change the units in the middle of
        a run."""
        assert self.start.checkpoint is not None
        with all_or_none(self.parts.context.parallel):
            self.progress = load_checkpoint(
                self.start.checkpoint,
                self.parts,
                self.optimizer,
                accepted=self.accepted,
                source_anew=self.source_anew,
            )
        logger.info("resumed from %s", self.start.checkpoint)

    def ready(self) -> None:
        """What is left to do before the folder is changed: all that can be tried has been afterwards."""
        parts, transcoder = self.parts, self.parts.transcoder
        self.calls = Calls(parts, self.optimizer, self.progress, self.recipe.train.steps) if parts.callbacks else None
        if self.calls is not None:
            self.calls.start()
        if self.start.checkpoint is not None:
            with all_or_none(parts.context.parallel):
                load_plugins_state(self.start.checkpoint, parts, self.accepted)
        self.progress.recipe, self.progress.identity = as_toml(self.recipe), self.identity
        # Only large matrices: a buffer per bias would save nothing.
        reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, transcoder.d_model))

    def steps(self, wants_stop: Callable[[], bool], *, silent: bool = False) -> Generator[None, None, None]:
        """Train; yields when the folder's records are written and the loggers have started, then once in each step
        (`loop.train`). At the end the transcoder is saved, and what only training needs is released.

        Raises:
            Stopped, OSError: see `loop.train`.
        """
        parts, folder = self.parts, self.start.folder
        with all_or_none(parts.context.parallel):
            if parts.context.parallel.rank == 0:
                set_aside(folder / "checkpoints", self.progress.step)
                set_aside(folder / "stages", self.progress.step, "results")
                before = self.start.before
                changed = changes(before.tables, self.recipe) if before is not None else []
                text = self.progress.recipe
                record_start(self.start, text, self.plugins, changed, self.accepted, self.progress.step)
        with _loggers(self.recipe, parts, self.progress.step) as loggers:
            yield
            # Last: callbacks and loggers may have drawn as they started, which the run that was left did before.
            if self.progress.generators:
                set_generators(self.progress.generators, parts.context.parallel, parts.context.device)
            parts.transcoder.train()
            self.scores = yield from train(
                parts,
                self.recipe.train,
                self.optimizer,
                self.schedule,
                self.progress,
                loggers,
                folder / "checkpoints",
                wants_stop,
                self.at_checkpoints,
                self.calls,
                silent=silent,
            )
            save_transcoder(parts.transcoder, folder / "transcoder")
        release_gradients(learned.parameters(parts).values())
        self.optimizer.state.clear()
        parts.transcoder.eval()

    def together(self) -> None:
        """The stages that all ranks run, after training."""
        parallel = self.parts.context.parallel
        folder = self.start.folder
        self.series = Series(
            root=folder,
            path=folder / "transcoder",
            transcoder=self.parts.transcoder,
            parts=self.parts,
            recipe=self.recipe,
            plugins=self.plugins,
            parallel=parallel,
            failures=self.at_checkpoints.failures,
        )
        for chosen in self._on_all():
            self.series.run(chosen)

    def _on_all(self) -> list[Chosen]:
        world = self.parts.context.parallel.world
        return [chosen for chosen in self.stages if world > 1 and chosen.info.ranks == "all"]

    def alone(self) -> CrossLayerTranscoder:
        """The stages that rank 0 runs; others have left. Returns what the stages made of the transcoder.

        Raises:
            Exception: what a stage raised; what failed in loggers, when all is done.
        """
        series, parallel, progress = self.series, self.parts.context.parallel, self.progress
        assert series is not None
        if progress.stopped:
            steps = self.recipe.train.steps
            logger.info("training ended at step %d of %d: %s", progress.step, steps, progress.stopped)
        if self.scores is not None:
            dead = f"{self.scores.dead_fraction:.1%} of features never active"
            logger.info("held-out NMSE %.4f at L0 %.1f, %s", self.scores.nmse, self.scores.l0, dead)
            for note in self.scores.notes():
                logger.warning("%s", note)
        logger.info("transcoder saved in %s", self.start.folder / "transcoder")
        series.parallel = None
        alone = self.stages[len(self._on_all()) :]
        if parallel.world > 1 and alone:
            # With all features; this rank's own are in the file.
            series.loaded().to_empty(device="meta")
            series.transcoder = None
        for chosen in alone:
            series.run(chosen)
        raise_first(series.failures)
        return series.loaded()


def _data(parts: Parts, start: Start, accepted: Collection[str]) -> tuple[dict[str, str], bool]:
    """What the data are made from; and whether the source starts anew, as the user accepted other data than the
    checkpoint's."""
    parallel = parts.context.parallel
    identity: dict[str, str] = {}
    anew = False
    with all_or_none(parallel):
        # Each rank needs it for its checkpoints. It may take long: no rank waits for another that does it alone.
        identity = identity_of(parts.source)
        if parallel.rank == 0 and start.before is not None:
            anew = check_identity(start.before, identity, start.recipe, accepted)
            check_data_ranks(start.before, parts.source, accepted)
    return identity, anyone(parallel, anew)


@contextmanager
def _loggers(recipe: Recipe, parts: Parts, step: int) -> Iterator[list[Logger]]:
    """The recipe's loggers, closed however the run ends. A logger that fails to close does not hide why it ended."""
    loggers: list[Logger] = []
    status, ended_well = "failed", False
    try:
        # Only rank 0 logs: metrics are totals over ranks already.
        for chosen in recipe.loggers if parts.context.parallel.rank == 0 else ():
            loggers.append(build(chosen, parts.context))
            loggers[-1].start(recipe_data(recipe), step)
        yield loggers
        status, ended_well = "finished", True
    except (KeyboardInterrupt, GeneratorExit):
        status = "interrupted"
        raise
    except Stopped as stop:
        status = "interrupted" if stop.code == ExitCode.INTERRUPTED else "failed"
        raise
    finally:
        failed: Exception | None = None
        for logger_ in loggers:
            try:
                logger_.close(status)
            except Exception as error:
                if ended_well and failed is None:
                    failed = error
                else:
                    logger.error("a logger could not be closed: %s", error)
        if failed is not None:
            raise failed
