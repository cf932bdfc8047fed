"""The command `stage`: any stage, also one of a plugin, done with a transcoder that is there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins.cli.options import with_plugins
from clt_plugins.errors import Faults, Refused

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.spec import Selected
    from clt_plugins.finished.find import Trained
    from clt_plugins.registry.plugins import Plugins


@click.command()
@click.argument("name")
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Path(path_type=Path), help="Whose model and data to use; else the run's.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the stage: tokens=1000.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; else the stage's in the run.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
@with_plugins
def stage(
    plugins: Plugins,
    name: str,
    place: Path,
    recipe: Path | None,
    settings: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Do the stage NAME with PLACE (a run or a transcoder).

    The stages that there are: `clt-plugins plugins stages`. Settings are those of this stage in the run's recipe.
    """
    from clt_plugins.cli.finished import new_folder, show
    from clt_plugins.finished.find import find_trained
    from clt_plugins.finished.job import Job
    from clt_plugins.finished.provenance import Provenance, results_read, settings_of
    from clt_plugins.finished.results import check_writable, raise_first
    from clt_plugins.finished.stages import build_stage, run_stage
    from clt_plugins.registry.build import naming_plugins

    trained = find_trained(place, plugins, recipe)
    selected = _selected(name, trained, settings)
    transcoder = trained.transcoder()
    known = trained.recipe() if trained.recipe_file is not None else None
    with naming_plugins(plugins.infos, known):
        info = build_stage(selected, transcoder.context).info
        reads = info.needs != "transcoder"
        root = trained.root()
        if out is None and root is None:
            raise Refused("--out", f"{place} is in no run: name a folder for the result")
        folder = out or root / info.folder  # type: ignore[operator]
        if out is None:
            check_writable(folder)
        opened: AbstractContextManager[tuple[Context, Source | None]] = (
            trained.opened() if reads else nullcontext((transcoder.context, None))
        )
        with opened as (context, source), new_folder(out) if out is not None else nullcontext(folder) as place:
            chosen = build_stage(selected, context)
            made_of = settings_of(selected, chosen.info, known)
            if root is not None:
                made_of |= results_read(root, chosen.info)
            job = Job(
                transcoder=transcoder,
                source=source,  # type: ignore[arg-type]
                recipe=known,
                context=context,
                plugins=plugins,
                folder=place,
                root=root,
                made_from=Provenance(transcoder=trained.origin(), settings=made_of),
                show=lambda text, record: show(text, record, as_json),
                log=lambda metrics: None,
            )
            chosen.stage.check(job)
            failures = run_stage(chosen, job, place)[1]
        click.echo(f"{name}: {folder}", err=True)
        raise_first(failures)


def _selected(name: str, trained: Trained, settings: tuple[str, ...]) -> Selected:
    """The stage with the settings of the run's recipe and of the command line.

    Raises:
        Faults: there is no such stage, or a setting is wrong.
    """
    from clt_plugins.recipe.overrides import Overrides
    from clt_plugins.recipe.structure import plain, structure_choice

    # The recipe of the transcoder's own run: another one may name any program for a stage to start.
    own = trained.recipe().stages if trained.run is not None else []
    table: dict[str, Any] = next((plain(one) for one in own if one.name == name), {"name": name})
    overrides = Overrides(settings)
    faults = overrides.apply(table)
    if faults:
        raise Faults(faults)
    return structure_choice(trained.plugins, "stages", table)
