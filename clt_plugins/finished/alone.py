"""A stage that a command runs alone, on a transcoder on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.finished.job import Job
from clt_plugins.finished.provenance import Provenance, results_read, settings_of
from clt_plugins.finished.results import kept
from clt_plugins.finished.stages import build_stage, run_stage
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import naming_plugins

if TYPE_CHECKING:
    from clt_plugins.contract.spec import Selected
    from clt_plugins.finished.find import Trained


def run_alone(
    trained: Trained, name: str, folder: Path | None, show: Callable[[str, Any], None], *, keep: bool = False
) -> list[Exception] | None:
    """Run a stage that reads the source. Its settings are those of the recipe, or the defaults if it has no such stage.

    Args:
        folder: where the result goes; None: it is only shown.
        show: see `Job.show`.
        keep: whether a complete result of the same transcoder and settings, in that folder, is not made again.

    Returns:
        What went wrong in loggers: the result is complete without them. None if a result was kept.

    Raises:
        Faults, Unreachable, OSError: see `Stage.run`.
    """
    recipe, selected = trained.recipe(), _stage(trained, name)
    with naming_plugins(trained.plugins.infos, recipe), trained.opened() as (context, source):
        chosen = build_stage(selected, context)
        root, settings = trained.root(), settings_of(selected, chosen.info, recipe)
        if root is not None:
            settings |= results_read(root, chosen.info)
        made_from = Provenance(transcoder=trained.origin(), settings=settings)
        if keep and folder is not None and kept(folder, chosen.info.record, made_from):
            return None
        job = Job(
            transcoder=trained.transcoder(),
            source=source,
            recipe=recipe,
            context=context,
            plugins=trained.plugins,
            folder=folder or Path(),
            root=root,
            made_from=made_from,
            show=show,
            log=lambda metrics: None,
        )
        with tempfile.TemporaryDirectory() if folder is None else nullcontext() as unseen:
            if unseen is not None:
                return run_stage(chosen, job, Path(unseen) / "result", log=job.log)[1]
            assert folder is not None
            return run_stage(chosen, job, folder)[1]


def _stage(trained: Trained, name: str) -> Selected:
    """The stage of that name in the recipe, or with its default settings."""
    of_recipe = (selected for selected in trained.recipe().stages if selected.name == name)
    return next(of_recipe, None) or structure_choice(trained.plugins, "stages", name)
