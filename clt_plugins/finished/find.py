"""What was trained, found again: a run's folder or a transcoder's, with the recipe and the source that belong to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from clt_plugins.contract.abilities import Closable
from clt_plugins.errors import Refused
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Trained:
    """A transcoder on disk."""

    folder: Path
    """The transcoder's own."""
    run: Path | None
    """The folder of the run that it comes from, where it is in one."""
    recipe_file: Path | None
    plugins: Plugins
    overrides: tuple[str, ...] = ()

    def transcoder(self) -> CrossLayerTranscoder:
        """Load it.

        Raises:
            ValueError: it is not whole, or needs a plugin that is not there.
        """
        from clt_plugins.model.transcoder import CrossLayerTranscoder

        device = "cpu"
        if self.recipe_file is not None:
            from clt_plugins.model.devices import make_device

            device = str(make_device(self.recipe().transcoder.device))
        found = CrossLayerTranscoder.load(self.folder, device=device, plugins=self.plugins)
        if not found.model_described() and self.recipe_file is not None:
            from clt_plugins.recipe.read import plain

            model = self.recipe().model
            found.described_model = {} if model is None else plain(model)
        return found

    def recipe(self) -> Recipe:
        """The recipe of its run, or the one given.

        Raises:
            ValueError: there is none.
        """
        if self.recipe_file is None:
            raise Refused(
                self.folder,
                "no recipe.toml with it to say what it reads: give a recipe with --recipe, "
                "whose [model] and [source] are used",
            )
        return read_recipe(self.recipe_file, self.overrides, self.plugins)

    @contextmanager
    def source(self) -> Iterator[Source]:
        """The source of the recipe, closed afterwards."""
        with self.opened() as (_, source):
            yield source

    @contextmanager
    def opened(self) -> Iterator[tuple[Context, Source]]:
        """The source with its context, closed afterwards."""
        from clt_plugins.model.assemble import make_context

        recipe = self.recipe()
        context = make_context(recipe)
        source = build(recipe.source, context)
        context = attrs.evolve(context, n_layers=source.n_layers, d_model=source.d_model)
        try:
            yield context, source
        finally:
            if isinstance(source, Closable):
                source.close()
            context.parallel.close()


def find_trained(
    place: Path, plugins: Plugins, recipe: Path | None = None, overrides: Sequence[str] = (), *, converted: bool = True
) -> Trained:
    """A transcoder at a place: a run's folder, a transcoder's, or another tool's.

    Args:
        recipe: instead of the run's own.
        converted: of a run that converted its transcoder, the converted one.

    Raises:
        ValueError: there is nothing of the kind; says what is missing.
    """
    if not place.exists():
        raise Refused(place, "no such folder")
    if (place / "transcoder.json").is_file():
        folder = place
        run = next((above for above in (place.parent, place.parent.parent) if (above / "recipe.toml").is_file()), None)
    elif (place / "recipe.toml").is_file():
        run = place
        names = ["converted", "transcoder"] if converted else ["transcoder"]
        whole = [place / name for name in names if (place / name / "transcoder.json").is_file()]
        if not whole:
            saved = sorted((place / "checkpoints").glob("step_*"))
            or_else = f", or name a checkpoint: {saved[-1]}" if saved else ""
            raise Refused(
                place, f"this run has no final transcoder, it did not end: go on with `run --resume`{or_else}"
            )
        folder = whole[0]
        logger.info("the transcoder in %s", folder)
    else:
        folder, run = place, None
    if recipe is None and run is not None:
        recipe = run / "recipe.toml"
    if recipe is None and overrides:
        raise Refused("--set", "there is no recipe to change: give one with --recipe")
    return Trained(folder=folder, run=run, recipe_file=recipe, plugins=plugins, overrides=tuple(overrides))
