"""A recipe's run: train, save, and the stages after that. `python -m clt_plugins run RECIPE` and `clt_plugins.run`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.contract.recipe import Recipe
from clt_plugins.distributed.agree import all_or_none, anyone, same_everywhere
from clt_plugins.distributed.signals import Signals, heard
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.finished.results import raise_first
from clt_plugins.finished.series import AtCheckpoints, Series
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import Parts, assemble, close, make_context
from clt_plugins.model.in_model.passes import check_losses
from clt_plugins.model.normalisation.fit import fit_to_source
from clt_plugins.model.parameters import is_matrix
from clt_plugins.model.saved import save_transcoder
from clt_plugins.model.sparse import release_gradients, reuse_gradients
from clt_plugins.recipe.read import as_toml, read_recipe, recipe_data
from clt_plugins.registry.build import build, naming_plugins
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.training import learned
from clt_plugins.training.between.calls import Calls
from clt_plugins.training.checkpoint import Progress, load_checkpoint, load_plugins_state, set_aside
from clt_plugins.training.folder import Start, record_start, run_folder, versions
from clt_plugins.training.loop import train
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.rate import with_rate
from clt_plugins.training.resume import changes, check_data_ranks, check_identity, identity_of
from clt_plugins.training.warm_start import warm_start

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.results.logger import Logger
    from clt_plugins.finished.stages import Chosen
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.model.warm_start.weights import WarmStart

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    resume: str | None = None,
    accept: Collection[str] = (),
    plugins: Plugins | None = None,
) -> CrossLayerTranscoder:
    """Train the transcoder a recipe describes; then do the stages that the recipe asks for.

    Args:
        recipe: typed, or a recipe file, or its tables as a dictionary.
        out: the run's folder; `runs/<name>/<time>` if not given.
        resume: go on from a checkpoint in `out`: "latest", or one's name ("step_000100").
        accept: settings that may differ from those of the checkpoint ("train.steps", "source.text"); see
            `training/resume`.

    Returns:
        The trained transcoder, also saved in `out/transcoder`; or what the stages made of it (`out/converted`).

    Raises:
        Faults: the recipe has faults, or something that it names does not fit or is not there.
        Stopped: interrupted, or stopped by a guard.
        PluginError: a plugin failed, in `build` or in a step; names plugin, distribution and choice.
    """
    plugins = plugins or load_plugins()
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, plugins=plugins)
    with ExitStack() as stack, heard() as signals:
        stack.enter_context(naming_plugins(plugins.infos, recipe))
        context = make_context(recipe)
        parallel = context.parallel
        stack.callback(parallel.close)
        if parallel.rank > 0:
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
        # Before any file is made: ranks that differ would train, and fail or differ hours later.
        _check_ranks(parallel, recipe, plugins)
        start = stack.enter_context(run_folder(parallel, recipe, out, resume, accept))
        # The engine draws from generators of its own; this one is for plugins that draw from torch's, and checkpointed.
        torch.manual_seed(recipe.seed)
        with all_or_none(parallel):
            parts = assemble(start.recipe, start.folder, context.device, parallel)
            stack.callback(close, parts)
            check_losses(start.recipe, parts.losses, parts.source, parallel.data_ranks)
            # What a stage would refuse at the end is refused now.
            stages = check_stages(parts, start.recipe, plugins)
            warm = warm_start(parts, start.recipe, plugins) if start.checkpoint is None else None
        return _train(parts, start, accept, plugins, signals, stages, warm)


def _check_ranks(parallel: Parallel, recipe: Recipe, plugins: Plugins) -> None:
    """All ranks must run the same thing."""
    installed = {f"plugin {info.name!r}": f"{info.distribution}, {info.status}" for info in plugins.infos}
    installed |= {f"distribution {name!r}": str(version) for name, version in versions(plugins)["libraries"].items()}
    same_everywhere(parallel, "installations", installed)
    same_everywhere(parallel, "recipes", {name: str(table) for name, table in recipe_data(recipe).items()})


def _train(
    parts: Parts,
    start: Start,
    accept: Collection[str],
    plugins: Plugins,
    signals: Signals,
    stages: Sequence[Chosen],
    warm: WarmStart | None,
) -> CrossLayerTranscoder:
    transcoder, source, folder = parts.transcoder, parts.source, start.folder
    parallel = parts.context.parallel
    rate = with_rate(start.recipe.train, transcoder.n_layers * transcoder.n_features)
    recipe = attrs.evolve(start.recipe, train=rate)
    own = {id(p) for p in transcoder.parameters()}
    extra = {name: p for name, p in learned.parameters(parts).items() if id(p) not in own}
    optimizer = make_optimizer(transcoder, recipe, extra)
    schedule = build(recipe.schedule, attrs.evolve(parts.context, recipe=recipe))
    idle = torch.zeros(transcoder.shape, dtype=torch.int64, device=parts.context.device)
    progress = Progress(step=0, tokens=0, idle_tokens=idle)
    identity, source_anew = _data(parts, start, accept)
    # A checkpoint holds the statistics; fitting again would change the units in the middle of a run.
    if start.checkpoint is None:
        if warm is None or warm.needs_statistics:
            fit_to_source(transcoder, source, recipe.train.statistics_tokens, recipe.train.batch_tokens)
        if warm is not None:
            warm.begin()
    else:
        with all_or_none(parallel):
            progress = load_checkpoint(start.checkpoint, parts, optimizer, accepted=accept, source_anew=source_anew)
        logger.info("resumed from %s", start.checkpoint)
    calls = Calls(parts, optimizer, progress, recipe.train.steps) if parts.callbacks else None
    if calls is not None:
        calls.start()
    if start.checkpoint is not None:
        with all_or_none(parallel):
            load_plugins_state(start.checkpoint, parts, accept)
    progress.recipe, progress.identity = as_toml(recipe), identity
    # Only large matrices: a buffer per bias would save nothing.
    reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, transcoder.d_model))
    # All that can be tried has been: from here on the folder is changed.
    signals.phase = "interrupted at once: the last checkpoint is complete, go on with --resume"
    with all_or_none(parallel):
        if parallel.rank == 0:
            set_aside(folder / "checkpoints", progress.step)
            set_aside(folder / "stages", progress.step, "results")
            changed = changes(start.before.tables, recipe) if start.before is not None else []
            record_start(start, progress.recipe, plugins, changed, accept, progress.step)
    at_checkpoints = AtCheckpoints(stages, folder, parts, recipe, plugins)
    with _loggers(recipe, parts, progress.step) as loggers:
        transcoder.train()
        with signals.in_loop():
            scores = train(
                parts,
                recipe.train,
                optimizer,
                schedule,
                progress,
                loggers,
                folder / "checkpoints",
                lambda: signals.asked,
                at_checkpoints,
                calls,
            )
            save_transcoder(transcoder, folder / "transcoder")
            # In the last step there was nothing to stop; what comes after it can still be left out.
            stopping = anyone(parallel, signals.asked) and bool(stages)
        signals.phase = f"interrupted after training: {folder / 'transcoder'} is saved, --resume does the rest"
        if stopping:
            raise Stopped(ExitCode.INTERRUPTED, signals.phase if parallel.rank == 0 else "")
    release_gradients(learned.parameters(parts).values())
    optimizer.state.clear()
    transcoder.eval()
    series = Series(
        root=folder,
        place=folder / "transcoder",
        transcoder=transcoder,
        parts=parts,
        recipe=recipe,
        plugins=plugins,
        parallel=parallel,
        failures=at_checkpoints.failures,
    )
    together = [chosen for chosen in stages if parallel.world > 1 and chosen.info.ranks == "all"]
    for chosen in together:
        series.run(chosen)
    # What follows is rank 0's alone and may take hours: no other rank waits for it.
    parallel.close()
    if parallel.rank > 0:
        return series.loaded()
    if progress.stopped:
        logger.info("training ended at step %d of %d: %s", progress.step, recipe.train.steps, progress.stopped)
    if scores is not None:
        dead = f"{scores.dead_fraction:.1%} of features never active"
        logger.info("held-out NMSE %.4f at L0 %.1f, %s", scores.nmse, scores.l0, dead)
        for note in scores.notes():
            logger.warning("%s", note)
    logger.info("transcoder saved in %s", folder / "transcoder")
    series.parallel = None
    alone = stages[len(together) :]
    if parallel.world > 1 and alone:
        # With all features; this rank's own are in the file.
        series.loaded().to_empty(device="meta")
        series.transcoder = None
    for chosen in alone:
        series.run(chosen)
    raise_first(series.failures)
    return series.loaded()


def _data(parts: Parts, start: Start, accept: Collection[str]) -> tuple[dict[str, str], bool]:
    """What the data are made from; and whether the source starts anew, as the user accepted other data than the
    checkpoint's."""
    parallel = parts.context.parallel
    identity: dict[str, str] = {}
    anew = False
    with all_or_none(parallel):
        # Each rank needs it for its checkpoints. It may take long: no rank waits for another that does it alone.
        identity = identity_of(parts.source)
        if parallel.rank == 0 and start.before is not None:
            anew = check_identity(start.before, identity, start.recipe, accept)
            check_data_ranks(start.before, parts.source, accept)
    return identity, anyone(parallel, anew)


@contextmanager
def _loggers(recipe: Recipe, parts: Parts, step: int) -> Iterator[list[Logger]]:
    """The recipe's loggers, closed however the run ends. A logger that fails to close does not hide why it ended."""
    loggers: list[Logger] = []
    status = "failed"
    try:
        # Only rank 0 logs: metrics are totals over ranks already.
        for chosen in recipe.loggers if parts.context.parallel.rank == 0 else ():
            loggers.append(build(chosen, parts.context))
            loggers[-1].start(recipe_data(recipe), step)
        yield loggers
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except Stopped as stop:
        status = "interrupted" if stop.code == ExitCode.INTERRUPTED else "failed"
        raise
    finally:
        ended_by = sys.exc_info()[1]
        for logger_ in loggers:
            try:
                logger_.close(status)
            except Exception as error:
                if ended_by is None:
                    raise
                logger.error("a logger could not be closed: %s", error)
