"""A recipe's run: train, save, and the stages after that. `python -m clt_plugins run RECIPE` and `clt_plugins.run`."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.distributed.agree import read, same_everywhere, together
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.files.folders import save_transcoder, write_json
from clt_plugins.finished.stages import after_training, check_stages
from clt_plugins.model.assemble import Parts, build, close, connect, make_device
from clt_plugins.model.normaliser import estimate
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.recipe.read import Recipe, as_data, as_toml, read_recipe
from clt_plugins.registry.build import blaming, check_built
from clt_plugins.training.checkpoint import Progress, find_checkpoint, load_checkpoint
from clt_plugins.training.loop import train
from clt_plugins.training.optimizer import is_matrix, make_optimizer, settled

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Logger, Parallel
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

FREE_ON_RESUME = ("train", "loggers", "convert", "evaluate", "exports", "requires", "name", "parallel")
"""Tables of a recipe that may differ when a run is resumed; the rest is what the checkpoint was made with."""


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    resume: str | None = None,
    plugins: Plugins | None = None,
) -> CrossLayerTranscoder:
    """Train the transcoder a recipe describes; then convert, evaluate and export it, as far as the recipe asks.

    Args:
        recipe: typed, or a recipe file, or its tables as a dictionary.
        out: the run's folder; `runs/<name>/<time>` if not given.
        resume: go on from a checkpoint in `out`: "latest", or one's name ("step_000100").

    Returns:
        The trained transcoder, also saved in `out/transcoder`; the converted one (`out/converted`) if converted.

    Raises:
        RecipeError: the recipe has faults.
        ValueError: something the recipe names does not fit or is not there.
        Stopped: interrupted, or stopped by a guard.
        PluginError: a plugin failed, in `build` or in a step; names plugin, distribution and choice.
    """
    from clt_plugins.registry.plugins import load

    plugins = plugins or load()
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, plugins=plugins)
    with ExitStack() as stack, _stop_signals() as wants_stop:
        stack.enter_context(blaming(plugins, recipe))
        device = make_device(recipe.transcoder.device)
        parallel = connect(recipe, device)
        stack.callback(parallel.close)
        if parallel.rank > 0:
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
        _check_ranks(parallel, recipe, plugins)
        folder, place = _places(parallel, recipe, out, resume)
        # The engine draws from generators of its own; this one is for plugins that draw from torch's, and checkpointed.
        torch.manual_seed(recipe.seed)
        with together(parallel):
            parts = build(recipe, plugins, folder, device, parallel)
            stack.callback(close, parts)
            check_stages(parts, recipe, plugins)
        return _train(parts, recipe, plugins, folder, place, wants_stop)


def _check_ranks(parallel: Parallel, recipe: Recipe, plugins: Plugins) -> None:
    """All ranks must run the same thing."""
    found = {f"plugin {info.name!r}": f"{info.distribution}, {info.status}" for info in plugins.infos}
    found |= {f"distribution {name!r}": str(version) for name, version in versions(plugins)["libraries"].items()}
    same_everywhere(parallel, "installations", found)
    same_everywhere(parallel, "recipes", {name: str(table) for name, table in as_data(recipe).items()})


def _places(parallel: Parallel, recipe: Recipe, out: str | Path | None, resume: str | None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to resume from: rank 0 looks, the others follow."""
    folder, place = Path(), None
    with together(parallel):
        if parallel.rank == 0:
            folder = Path(out) if out is not None else _default_folder(recipe, resume)
            _prepare(folder, recipe, resume)
            place = find_checkpoint(folder / "checkpoints", resume) if resume else None
    folder = Path(parallel.gather(str(folder))[0])
    name = parallel.gather(place.name if place is not None else "")[0]
    return folder, folder / "checkpoints" / name if name else None


def _train(
    parts: Parts, recipe: Recipe, plugins: Plugins, folder: Path, place: Path | None, wants_stop: Any
) -> CrossLayerTranscoder:
    transcoder, source = parts.transcoder, parts.source
    recipe = attrs.evolve(recipe, train=settled(recipe.train, transcoder.layers * transcoder.features))
    optimizer = make_optimizer(transcoder, recipe.train, recipe.seed)
    idle = torch.zeros(transcoder.W_enc.shape[:2], dtype=torch.int64, device=parts.context.device)
    progress = Progress(step=0, tokens=0, idle_tokens=idle)
    if place is None:
        _fit_normaliser(parts, recipe)
    else:
        with together(parts.context.parallel):
            progress = load_checkpoint(place, transcoder, optimizer, source)
        logger.info("resumed from %s", place)
    reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, transcoder.d_model))
    parallel = parts.context.parallel
    with together(parallel):
        if parallel.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.toml").write_text(as_toml(recipe))
            write_json(folder / "versions.json", versions(plugins))
    with _loggers(recipe, parts, progress.step) as loggers:
        transcoder.train()
        scores = train(parts, recipe.train, optimizer, progress, loggers, folder / "checkpoints", wants_stop)
        save_transcoder(transcoder, folder / "transcoder")
    if parallel.rank > 0:
        return transcoder.eval()
    if scores:
        found = "NMSE {nmse:.4f} at L0 {l0:.1f}, {dead_fraction:.1%} of features never active".format(**scores)
        print(f"held-out {found}", file=sys.stderr)
    print(f"transcoder saved in {folder / 'transcoder'}", file=sys.stderr)
    transcoder.eval()
    if parallel.world > 1 and (recipe.convert or recipe.evaluate or recipe.exports):
        # The other ranks have ended: what follows is this one's, with all features.
        transcoder = type(transcoder).load(folder / "transcoder", plugins=plugins)
    return after_training(transcoder, source, recipe=recipe, context=parts.context, plugins=plugins, folder=folder)


@contextmanager
def _loggers(recipe: Recipe, parts: Parts, step: int) -> Iterator[list[Logger]]:
    """The recipe's loggers, closed however the run ends. A logger that fails to close does not hide why it ended."""
    loggers: list[Logger] = []
    status = "failed"
    try:
        for chosen in recipe.loggers if parts.context.parallel.rank == 0 else ():
            loggers.append(check_built(chosen.build(parts.context), "loggers", chosen.spec))
            loggers[-1].start(as_data(recipe), step)
        yield loggers
        status = "finished"
    except Stopped as stop:
        status = "interrupted" if stop.code == ExitCode.INTERRUPTED else "failed"
        raise
    finally:
        ended_by = sys.exc_info()[1]
        for each in loggers:
            try:
                each.close(status)
            except Exception as error:
                if ended_by is None:
                    raise
                logger.error("a logger could not be closed: %s", error)


def _default_folder(recipe: Recipe, resume: str | None) -> Path:
    base = Path("runs") / recipe.name
    if resume is None:
        return base / time.strftime("%Y%m%d-%H%M%S")
    known = sorted(path for path in base.glob("*") if (path / "checkpoints").is_dir()) if base.is_dir() else []
    if not known:
        raise ValueError(f"--resume: no run with checkpoints in {base}: give its folder with --out")
    return known[-1]


def _prepare(folder: Path, recipe: Recipe, resume: str | None) -> None:
    """Refuse a folder in use, or a resumed run that is not the same."""
    if resume is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: already there: go on with --resume, or give another folder with --out")
        return
    import tomllib

    saved = folder / "recipe.toml"
    if not saved.is_file():
        raise ValueError(f"{folder}: nothing to resume: no recipe.toml in it")
    before, now = tomllib.loads(saved.read_text()), tomllib.loads(as_toml(recipe))
    for table in sorted(before.keys() | now.keys()):
        if table not in FREE_ON_RESUME and before.get(table) != now.get(table):
            raise ValueError(
                f"{table}: differs from the run in {folder}: it was {before.get(table)}, now it is {now.get(table)}; "
                "a resumed run must be the same"
            )
    fixed = ("batch_tokens", "optimizer", "states")
    for key in fixed:
        if before.get("train", {}).get(key) != now["train"].get(key):
            raise ValueError(f"train.{key}: differs from the run in {folder}; a resumed run must be the same")


def _fit_normaliser(parts: Parts, recipe: Recipe) -> None:
    """Set the transcoder's statistics: the source's own, or those of its first batches (which are still trained on)."""
    source, settings = parts.source, recipe.transcoder
    found = source.statistics()
    if found is None:
        state = source.state()
        count = max(1, -(-settings.normalisation_tokens // recipe.train.batch_tokens))
        parallel = parts.context.parallel
        batches = (read(source, parallel) for _ in range(count))
        found = estimate(batches, source.layers, source.d_model, parallel)
        source.load_state(state)
    parts.transcoder.normaliser.fit(settings.normalisation, found)


def versions(plugins: Plugins) -> dict[str, Any]:
    """What ran: the interpreter, libraries, and every plugin with its distribution."""
    from importlib.metadata import version

    from clt_plugins import __version__

    libraries = ("torch", "transformers", "nnsight", "datasets", "numba", "numpy", "safetensors")
    return {
        "clt_plugins": __version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "plugins": {info.name: info.distribution for info in plugins.infos},
        "command": sys.argv,
    }


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if os.environ.get("RANK", "0") == "0":
            print("stopping after this step (again to stop at once)", file=sys.stderr)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}  # signals belong to the main thread; elsewhere the caller has them
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
