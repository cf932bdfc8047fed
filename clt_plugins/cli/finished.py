"""Commands for a trained transcoder: convert, evaluate, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins.cli.options import with_plugins, with_trained
from clt_plugins.errors import Faults, Refused

if TYPE_CHECKING:
    from clt_plugins.finished.find import Trained
    from clt_plugins.registry.plugins import Plugins

OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")


def _new(folder: Path) -> Path:
    """The folder, if it can be written.

    Raises:
        Refused: there is something in it, or it is the working directory.
    """
    if folder.resolve() == Path.cwd().resolve():
        raise Refused(folder, "is the working directory, which cannot be replaced: give a new folder with --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(folder, "already there: give another folder with --out")
    return folder


@click.command()
@with_trained(converted=False)
@OUT
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def convert(trained: Trained, out: Path, as_json: bool) -> None:
    """Give PLACE (a run or a transcoder) thresholds in place of TopK or BatchTopK.

    Settings are those of the recipe's [convert], and can be changed: --set convert.tolerance=0.01.
    """
    from clt_plugins.contract.recipe import ConvertConfig
    from clt_plugins.files.records import json_text
    from clt_plugins.finished import stages
    from clt_plugins.finished.convert import as_table
    from clt_plugins.registry.build import naming_plugins

    _new(out)
    recipe = trained.recipe()
    config = recipe.convert or ConvertConfig()
    with naming_plugins(trained.plugins.infos, recipe):
        transcoder = trained.transcoder()
        with trained.source() as source:
            _, report = stages.convert_stage(transcoder, source, config, trained.plugins, out)
    click.echo(json_text(report) if as_json else as_table(report))


@click.command()
@with_trained()
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for evaluation.json and what loggers write.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def evaluate(trained: Trained, out: Path | None, as_json: bool) -> None:
    """Evaluate PLACE (a run, a transcoder, or another tool's folder) on held-out text, alone and in the language model.

    Settings are those of the recipe's [evaluate], and can be changed: --set evaluate.tokens=10000. The recipe's loggers
    and evaluation.json are also written: into the folder that --out names, else into evaluation/ of the run.
    """
    from clt_plugins.contract.recipe import EvaluateConfig
    from clt_plugins.files.records import json_text
    from clt_plugins.finished import stages
    from clt_plugins.finished.evaluate import as_table
    from clt_plugins.registry.build import naming_plugins

    folder = _new(out) if out is not None else None
    if folder is None and trained.run is not None:
        folder = trained.run / "evaluation"
    recipe = trained.recipe()
    config = recipe.evaluate or EvaluateConfig()
    with naming_plugins(trained.plugins.infos, recipe):
        transcoder = trained.transcoder()
        with trained.opened() as (context, source):
            report = stages.evaluate_stage(transcoder, source, config, recipe=recipe, context=context, folder=folder)
    click.echo(json_text(report) if as_json else as_table(report))


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--format", "name", required=True, help="One of `clt_plugins plugins exports`.")
@OUT
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the format: dtype=bfloat16.")
@with_plugins
def export(plugins: Plugins, place: Path, name: str, out: Path, settings: tuple[str, ...]) -> None:
    """Write PLACE (a run, a transcoder, or another tool's folder) in the format of another tool."""
    from clt_plugins.finished import stages
    from clt_plugins.finished.find import find_trained
    from clt_plugins.recipe.overrides import Overrides
    from clt_plugins.recipe.structure import structure_choice
    from clt_plugins.registry.build import naming_plugins

    _new(out)
    table: dict[str, Any] = {"name": name}
    faults = Overrides(settings).apply(table)
    if faults:
        raise Faults(faults)
    chosen = structure_choice(plugins, "exports", table, "--format")
    with naming_plugins(plugins.infos, None):
        transcoder = find_trained(place, plugins).transcoder()
        stages.export_stage(transcoder, chosen, out)
    click.echo(f"exported to {out}", err=True)
