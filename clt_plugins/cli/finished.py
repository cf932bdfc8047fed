"""Commands for a trained transcoder: convert, evaluate, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins.cli.options import with_plugins, with_trained
from clt_plugins.errors import Faults, Refused

if TYPE_CHECKING:
    from clt_plugins.contract.spec import Selected
    from clt_plugins.files.hub.names import HubPlace
    from clt_plugins.finished.find import Trained
    from clt_plugins.registry.plugins import Plugins

MANIFEST = "manifest.json"

OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")


def _check_new(folder: Path) -> None:
    """Before work, look whether a new folder can be written.

    Raises:
        Refused: there is something in it, or it cannot be written.
    """
    from clt_plugins.finished.results import check_writable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(folder, "already there: give another folder with --out")
    check_writable(folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields the new folder that a stage is to write.

    Raises:
        Refused: see `_check_new`.
    """
    _check_new(folder)
    if folder.resolve() != Path.cwd().resolve():
        yield folder
        return
    # The shell is in it, so it is filled and not replaced. The manifest comes last: it makes a folder complete.
    inside = folder / ".clt-plugins-new"
    yield inside
    for path in sorted(inside.iterdir(), key=lambda path: path.name == MANIFEST):
        path.rename(folder / path.name)
    inside.rmdir()


def _run(name: str, trained: Trained, folder: Path | None, as_json: bool) -> list[Exception]:
    """Run a stage of the recipe; see `run_alone`."""
    from clt_plugins.finished.alone import run_alone

    return run_alone(trained, name, folder, lambda text, record: show(text, record, as_json)) or []


def show(text: str, record: Any, as_json: bool) -> None:
    from clt_plugins.files.records import json_text

    click.echo(json_text(record) if as_json else text)


@click.command()
@with_trained(converted=False)
@OUT
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def convert(trained: Trained, out: Path, as_json: bool) -> None:
    """Give PLACE (a run or a transcoder) thresholds in place of TopK or BatchTopK.

    Settings are those of the stage `convert` in the recipe, and can be changed: --set stages.convert.tolerance=0.01.
    """
    with new_folder(out) as folder:
        _run("convert", trained, folder, as_json)


@click.command()
@with_trained()
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for evaluation.json and what loggers write.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def evaluate(trained: Trained, out: Path | None, as_json: bool) -> None:
    """Evaluate PLACE (a run, a transcoder, or another tool's folder) on held-out text, alone and in the language model.

    Settings are those of the stage `evaluate` in the recipe, and can be changed: --set stages.evaluate.tokens=10000.
    The recipe's loggers and evaluation.json are also written: into the folder that --out names, else into evaluation/
    of the run; of a checkpoint, or of another transcoder that is not the run's final one, into evaluations/NAME/.
    """
    from contextlib import nullcontext

    from clt_plugins.finished.results import check_writable, raise_first
    from clt_plugins.registry.build import naming_plugins

    report_folder = trained.report_folder()
    if out is None and report_folder is not None:
        check_writable(report_folder)
    with new_folder(out) if out is not None else nullcontext(report_folder) as folder:
        failures = _run("evaluate", trained, folder, as_json)
    with naming_plugins(trained.plugins.infos, trained.recipe()):
        raise_first(failures)


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--format", "name", required=True, help="One of `clt_plugins plugins exports`.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.")
@click.option("--to", metavar="hf://USER/NAME/FOLDER", help="Or a folder on the Hugging Face hub; it is replaced.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the format: dtype=bfloat16.")
@with_plugins
def export(
    plugins: Plugins, place: Path, name: str, out: Path | None, to: str | None, settings: tuple[str, ...]
) -> None:
    """Write PLACE (a run, a transcoder, or another tool's folder) in the format of another tool.

    With --to it is uploaded, into a private repository if there is none of that name. The model card is made by `push`,
    which takes the exports of a run along.
    """
    import tempfile

    from clt_plugins.files.hub.upload import upload
    from clt_plugins.recipe.overrides import Overrides
    from clt_plugins.recipe.structure import structure_choice
    from clt_plugins.registry.build import naming_plugins

    table: dict[str, Any] = {"name": name}
    faults = Overrides(settings).apply(table)
    if faults:
        raise Faults(faults)
    structure_choice(plugins, "exports", table, "--format")
    selected = structure_choice(plugins, "stages", {"name": "export", "format": table}, "--format")
    if (out is None) == (to is None):
        raise Refused("--out", "say where to: --out FOLDER, or --to hf://USER/NAME/FOLDER")
    target = None if to is None else _folder_on_the_hub(to)
    with tempfile.TemporaryDirectory(prefix="clt-plugins-") as unseen, naming_plugins(plugins.infos, None):
        _export(place, selected, plugins, out or Path(unseen) / name)
        where = str(out)
        if target is not None:
            commit = upload(Path(unseen) / name, target, message=f"Export in the format {name}", replaces=["*"])
            where = f"{target}, commit {commit}"
    click.echo(f"exported to {where}", err=True)


def _folder_on_the_hub(to: str) -> HubPlace:
    """The folder that an export goes into.

    Raises:
        Refused: it is no folder in a repository, or nothing could be uploaded.
    """
    from clt_plugins.files.hub.names import HubPlace
    from clt_plugins.files.hub.upload import check_upload

    place = HubPlace.parse(to)
    if not place.folder:
        raise Refused("--to", f"name a folder in the repository, which the export replaces: {place}/NAME")
    check_upload(place)
    return place


def _export(place: Path, selected: Selected, plugins: Plugins, out: Path) -> None:
    from clt_plugins.finished.find import find_trained
    from clt_plugins.finished.job import Job
    from clt_plugins.finished.provenance import Provenance, settings_of
    from clt_plugins.finished.stages import build_stage, run_stage

    with new_folder(out) as folder:
        trained = find_trained(place, plugins)
        transcoder = trained.transcoder()
        chosen = build_stage(selected, transcoder.context)
        job = Job(
            transcoder=transcoder,
            recipe=None,
            context=transcoder.context,
            plugins=plugins,
            folder=folder,
            made_from=Provenance(transcoder=trained.origin(), settings=settings_of(selected, chosen.info, None)),
            show=lambda text, record: None,
            log=lambda metrics: None,
        )
        run_stage(chosen, job, folder)
