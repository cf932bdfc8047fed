"""The command `report`: collected features made into a site, or into another tool's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins.cli.options import with_plugins
from clt_plugins.errors import Faults, Refused

if TYPE_CHECKING:
    from clt_plugins.contract.spec import Selected
    from clt_plugins.finished.find import Trained
    from clt_plugins.finished.provenance import Origin
    from clt_plugins.registry.plugins import Plugins

STORE = "collected"
"""The folder of a run that `collect` writes."""


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder, or one with a report.")
@click.option(
    "--format", "name", default="site", show_default=True, help="What to make: one of `clt_plugins plugins reports`."
)
@click.option("--graph", "graphs", multiple=True, type=click.Path(path_type=Path), help="An attribution graph to show.")
@click.option("--collect", "collecting", is_flag=True, help="Collect the features first, where that was not done.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the format: shard=64.")
@with_plugins
def report(
    plugins: Plugins,
    place: Path,
    out: Path,
    name: str,
    graphs: tuple[Path, ...],
    collecting: bool,
    settings: tuple[str, ...],
) -> None:
    """Show what the features of PLACE do: a run, a transcoder, or a folder that `collect` wrote.

    The format `site` is a site of all features that opens from disk: open OUT/index.html in a browser.
    """
    from clt_plugins.collected.reader import Collected
    from clt_plugins.collected.report import check_replaceable, write_report
    from clt_plugins.files.untrusted import has_file
    from clt_plugins.finished.facts import read_facts, run_of
    from clt_plugins.registry.build import naming_plugins

    selected = _selected(plugins, name, graphs, settings)
    check_replaceable(out)
    with naming_plugins(plugins.infos, None):
        if has_file(place / f"{STORE}.json"):
            store, run, evaluation = place, run_of(place / f"{STORE}.json"), None
        else:
            store, run, evaluation = _of_transcoder(place, plugins, collecting)
        collected = Collected.open(store)
        made_from = collected.info.made_from
        facts = read_facts(run, made_from.transcoder if made_from is not None else None, evaluation)
        write_report(selected, collected, facts, out)
    for note in facts.notes:
        click.echo(f"note: {note}", err=True)
    opened = out / "index.html"
    click.echo(f"open {opened} in a browser" if opened.is_file() else f"written to {out}", err=True)


def _selected(plugins: Plugins, name: str, graphs: tuple[Path, ...], settings: tuple[str, ...]) -> Selected:
    """The format with its settings.

    Raises:
        Faults: there is no such format, or a setting is wrong.
    """
    from clt_plugins.recipe.overrides import Overrides
    from clt_plugins.recipe.structure import structure_choice

    table: dict[str, Any] = {"name": name}
    if graphs:
        table["graphs"] = [str(graph.absolute()) for graph in graphs]
    faults = Overrides(settings).apply(table)
    if faults:
        raise Faults(faults)
    return structure_choice(plugins, "reports", table, "--format")


def _of_transcoder(place: Path, plugins: Plugins, collecting: bool) -> tuple[Path, Path | None, Path | None]:
    """The store of a run or a transcoder, the run's folder, and the folder of its evaluation.

    Raises:
        Refused: its features are not collected, or those of another transcoder are; says what to do.
    """
    from clt_plugins.files.untrusted import has_file
    from clt_plugins.finished.find import find_trained

    trained = find_trained(place, plugins)
    store = trained.collected_folder()
    if store is None:
        text = "is in no run: collect its features into a folder (`clt-plugins collect`), and name that folder"
        raise Refused(place, text)
    if collecting and not _is_of(store, trained):
        from clt_plugins.finished.alone import run_alone

        run_alone(trained, "collect", store, lambda text, record: click.echo(text, err=True))
    if not has_file(store / f"{STORE}.json"):
        text = f"its features are not collected: add --collect, or first `clt-plugins collect {place}`"
        raise Refused(place, text)
    if not _is_of(store, trained):
        text = "its features were collected from another transcoder: add --collect, or name that folder itself"
        raise Refused(store, text)
    return store, trained.run, trained.report_folder()


def _is_of(store: Path, trained: Trained) -> bool:
    """Whether a store is of a transcoder; or of the one before or after its conversion, which has the same features."""
    from clt_plugins.finished.provenance import recorded

    record = recorded(store / f"{STORE}.json")
    if record is None:
        return False
    own = trained.origin()
    return bool({one.sha256 for one in _family(record.transcoder)} & {one.sha256 for one in _family(own)})


def _family(origin: Origin) -> list[Origin]:
    return [origin, *([] if origin.converted_from is None else _family(origin.converted_from))]
