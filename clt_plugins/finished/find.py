"""A transcoder on disk, in a run's folder or alone, with the recipe and the source that belong to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from clt_plugins.contract.reading.source import Closable
from clt_plugins.errors import Faults, Refused
from clt_plugins.files.folders import recover
from clt_plugins.files.hub.choose import fetch_place
from clt_plugins.files.hub.names import HubPlace, hub_place
from clt_plugins.files.steps import step_folders
from clt_plugins.files.untrusted import has_file
from clt_plugins.finished.provenance import Origin, identify, made_from_other
from clt_plugins.recipe.local import check_foreign
from clt_plugins.recipe.read import read_usable_recipe
from clt_plugins.recipe.structure import plain
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True, eq=False)
class Trained:
    """A transcoder on disk."""

    folder: Path
    """The transcoder's folder, as an absolute path."""
    run: Path | None
    """The folder of the run that trained it, as an absolute path; None if it is not in one."""
    recipe_file: Path | None
    """The recipe of that run, or another one that the user named; None if there is none."""
    plugins: Plugins
    """The choices that the recipe and the transcoder's files can name."""
    overrides: tuple[str, ...] = ()
    """Changes of the recipe's settings, `KEY=VALUE` each."""
    hub: HubPlace | None = None
    """The folder on the hub that the user named; None for one of this disk. Then `folder` is in the hub's cache, where
    nothing may be written, and `run` is None."""
    foreign: bool = False
    """Whether the recipe is that of a folder on the hub."""

    def transcoder(self) -> CrossLayerTranscoder:
        """Load it, on the device that the recipe names.

        Raises:
            Faults: it is not complete, or needs a plugin that is not installed.
        """
        from clt_plugins.model.devices import make_device
        from clt_plugins.model.transcoder import CrossLayerTranscoder

        if self.recipe_file is None:
            return CrossLayerTranscoder.load(self.folder, plugins=self.plugins)
        recipe = self.recipe()
        device = str(make_device(recipe.transcoder.device))
        transcoder = CrossLayerTranscoder.load(self.folder, device=device, plugins=self.plugins)
        if not transcoder.model_described() and recipe.model is not None:
            # A folder of another tool may not say which language model it is for.
            transcoder.described_model = plain(recipe.model)
        return transcoder

    def origin(self) -> Origin:
        """What results are to say of it.

        Raises:
            Faults: a file that describes it is damaged.
        """
        return identify(self.folder)

    def report_folder(self) -> Path | None:
        """Where its evaluation goes in its run; None if it is in no run.

        That of the run's final transcoder is in `evaluation/`, that of any other one, such as a checkpoint, in
        `evaluations/NAME/`.
        """
        if self.run is None:
            return None
        return self.run / "evaluation" if self._is_final() else self.run / "evaluations" / self.folder.name

    def root(self) -> Path | None:
        """The folder of its run that results of stages go below; None if it is in no run.

        That of the run's final transcoder is the run's, that of any other one, such as a checkpoint, is
        `stages/NAME/`, like that of a stage during training.
        """
        if self.run is None:
            return None
        return self.run if self._is_final() else self.run / "stages" / self.folder.name

    def collected_folder(self) -> Path | None:
        """Where what its features do is collected in its run; None if it is in no run."""
        root = self.root()
        return None if root is None else root / "collected"

    def _is_final(self) -> bool:
        """Whether it is the final transcoder of its run."""
        assert self.run is not None
        try:
            return self.folder == _final_transcoder(self.run, self.run, converted=True, quiet=True)
        except Faults:
            return False  # the run has not ended

    def recipe(self) -> Recipe:
        """The recipe of its run, or the one that the user named; the file is read once.

        Choices of plugins that are not installed are left out, unless the source needs them: a transcoder can be judged
        without the losses and loggers that it was trained with.

        Raises:
            Refused: there is none.
            Faults: the recipe has faults.
        """
        return self._recipe

    @cached_property
    def _recipe(self) -> Recipe:
        if self.recipe_file is None:
            raise Refused(
                self.folder,
                "no recipe.toml with it to say what it reads: give a recipe with --recipe, "
                "whose [model] and [source] are used",
            )
        recipe, missing = read_usable_recipe(self.recipe_file, self.overrides, self.plugins)
        for text in missing:
            logger.warning("%s: %s, left out", self.recipe_file, text)
        if self.foreign:
            check_foreign(recipe, str(self.hub))
            model = f"the model {recipe.model.path!r}" if recipe.model is not None else "no model"
            logger.info("%s: its own recipe is used, with %s; --recipe takes another", self.hub, model)
        return recipe

    @contextmanager
    def source(self) -> Iterator[Source]:
        """The source of the recipe with its transforms, closed afterwards."""
        with self.opened() as (_, source):
            yield source

    @contextmanager
    def opened(self) -> Iterator[tuple[Context, Source]]:
        """The source of the recipe with its transforms, and its context; closed afterwards."""
        from clt_plugins.distributed.transformed import transformed
        from clt_plugins.model.assemble import make_context, of_data

        recipe = self.recipe()
        context = make_context(recipe)
        try:
            source = build(recipe.source, of_data(context))
            try:
                context = attrs.evolve(context, n_layers=source.n_layers, d_model=source.d_model)
                transforms = [build(transform, of_data(context)) for transform in recipe.transforms]
                yield context, transformed(source, transforms, context)
            finally:
                if isinstance(source, Closable):
                    source.close()
        finally:
            context.parallel.close()


def find_trained(
    path: Path, plugins: Plugins, recipe: Path | None = None, overrides: Sequence[str] = (), *, converted: bool = True
) -> Trained:
    """The transcoder in a folder.

    Args:
        path: a run's folder, a transcoder's folder (of a run, or a checkpoint), or another tool's folder; or one on the
            hub (see `hub_place`), which is downloaded.
        recipe: a recipe to use instead of the run's.
        converted: whether to prefer the converted transcoder, of a run that has one.

    Raises:
        Refused: there is no such folder, or it is a run that has not ended.
    """
    place = hub_place(path)
    if place is not None:
        path = fetch_place(place, converted=converted)
    # A crash may have left a folder under its temporary name.
    for one in (path, path / "transcoder", path / "converted"):
        recover(one)
    if not path.exists():
        raise Refused(path, "no such folder")
    folder, run = path.resolve(), None  # `.` has no parent: an absolute path does
    if has_file(folder / "transcoder.json"):
        run = next((above for above in folder.parents[:2] if has_file(above / "recipe.toml")), None)
    elif has_file(folder / "recipe.toml"):
        run = folder
        folder = _final_transcoder(run, path, converted)
        logger.info("the transcoder in %s", path / folder.name)
    foreign = place is not None and recipe is None and run is not None
    if recipe is None and run is not None:
        recipe = run / "recipe.toml"
    if recipe is None and overrides:
        raise Refused("--set", "there is no recipe to change: give one with --recipe")
    return Trained(
        folder=folder,
        run=run if place is None else None,
        recipe_file=recipe,
        plugins=plugins,
        overrides=tuple(overrides),
        hub=place,
        foreign=foreign,
    )


def _final_transcoder(run: Path, path: Path, converted: bool, quiet: bool = False) -> Path:
    """The folder of a run's final transcoder.

    Args:
        path: how the user named the run.

    Raises:
        Refused: there is none, or a folder of one is damaged.
    """
    final, thresholded = run / "transcoder", run / "converted"
    # Folders appear when they are whole: another transcoder is not taken in the place of a damaged one in silence.
    remedies = {final: "write it anew by `run --resume`"}
    if converted:
        remedies[thresholded] = "write it anew by `run --resume`, or remove it"
    for folder, remedy in remedies.items():
        if os.path.lexists(folder) and not has_file(folder / "transcoder.json"):
            raise Refused(folder / "transcoder.json", f"missing: the folder is damaged: {remedy}")
    if converted and has_file(thresholded / "transcoder.json"):
        if not has_file(final / "transcoder.json"):
            return thresholded
        # A run that went on, or one that was resumed from another checkpoint, may have left an older conversion.
        if not made_from_other(thresholded, "convert.json", identify(final)):
            return thresholded
        if not quiet:
            logger.warning(
                "%s was made from another transcoder than %s: the latter is taken; convert it again, or name the "
                "former's folder",
                path / "converted",
                path / "transcoder",
            )
    if has_file(final / "transcoder.json"):
        return final
    saved = step_folders(run / "checkpoints")
    or_else = f", or name a checkpoint: {path / 'checkpoints' / saved[-1].name}" if saved else ""
    raise Refused(path, f"this run has no final transcoder, it did not end: go on with `run --resume`{or_else}")
