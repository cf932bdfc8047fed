"""A recipe's run: train, save, and the stages after that. `python -m clt_plugins run RECIPE` and `clt_plugins.run`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt_plugins.contract.recipe import Recipe
from clt_plugins.distributed.agree import all_or_none, anyone, same_everywhere
from clt_plugins.distributed.signals import Signals, heard
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import assemble, close, make_context
from clt_plugins.model.in_model.passes import check_losses
from clt_plugins.model.normalisation.fit import fit_to_source
from clt_plugins.recipe.read import read_recipe, recipe_data
from clt_plugins.registry.build import naming_plugins
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.training.between.steering import check_steering
from clt_plugins.training.host.memory import kept_memory
from clt_plugins.training.host.threads import restored_threads
from clt_plugins.training.prepared import Prepared
from clt_plugins.training.saved.folder import run_folder
from clt_plugins.training.saved.history import versions

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.model.transcoder import CrossLayerTranscoder


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
            `training/saved/resume`.

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
        stack.enter_context(kept_memory(context.device))
        stack.enter_context(restored_threads())
        # The engine draws from generators of its own; this one is for plugins that draw from torch's, and checkpointed.
        torch.manual_seed(recipe.seed)
        with all_or_none(parallel):
            parts = assemble(start.recipe, start.folder, context.device, parallel)
            stack.callback(close, parts)
            check_losses(start.recipe, parts.losses, parts.source, parallel.data_ranks)
            check_steering(parts)
            # What a stage would refuse at the end is refused now.
            stages = check_stages(parts, start.recipe, plugins)
        return _train(Prepared(parts, start, accept, plugins, stages), signals)


def _check_ranks(parallel: Parallel, recipe: Recipe, plugins: Plugins) -> None:
    """All ranks must run the same thing."""
    installed = {f"plugin {info.name!r}": f"{info.distribution}, {info.status}" for info in plugins.infos}
    installed |= {f"distribution {name!r}": str(version) for name, version in versions(plugins)["libraries"].items()}
    same_everywhere(parallel, "installations", installed)
    same_everywhere(parallel, "recipes", {name: str(table) for name, table in recipe_data(recipe).items()})


def _train(one: Prepared, signals: Signals) -> CrossLayerTranscoder:
    parts, parallel = one.parts, one.parts.context.parallel
    if one.begins:
        if one.needs_statistics:
            train = one.recipe.train
            fit_to_source(parts.transcoder, parts.source, train.statistics_tokens, train.batch_tokens)
        one.begin()
    else:
        one.load()
    one.ready()
    # From here on the folder is changed.
    signals.phase = "interrupted at once: the last checkpoint is complete, go on with --resume"
    steps = one.steps(lambda: signals.asked)
    with closing(steps):
        next(steps)
        with signals.in_loop():
            for _ in steps:
                pass
            # In the last step there was nothing to stop; what comes after it can still be left out.
            stopping = anyone(parallel, signals.asked) and bool(one.stages)
    saved = one.start.folder / "transcoder"
    signals.phase = f"interrupted after training: {saved} is saved, --resume does the rest"
    if stopping:
        raise Stopped(ExitCode.INTERRUPTED, signals.phase if parallel.rank == 0 else "")
    one.together()
    # What follows is rank 0's alone and may take hours: no other rank waits for it.
    parallel.close()
    if parallel.rank > 0:
        assert one.series is not None
        return one.series.loaded()
    return one.alone()
