"""What a trained transcoder has learned, shown: the stage `report` with the form `site`; the commands `thresholds` and
`top-activations`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Selected, Spec, default_choice, hookimpl, with_trained

if TYPE_CHECKING:
    from clt_plugins import Context, Trained

_positive: Any = validators.gt(0)


@frozen(kw_only=True)
class ReportConfig:
    """Collected features made into a site, or into another tool's files. It stands after the stage `collect`."""

    format: Annotated[Selected, "reports"] = default_choice("site")
    """What is made of them, with its settings."""
    collected: str = "collected"
    """The folder that the stage `collect` writes."""
    folder: str | None = None
    """The folder in `reports/`; the format's name if not given."""
    every: int | None = field(default=None, validator=validators.optional(_positive), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints; `collect` must then be made at them too."""


@frozen(kw_only=True)
class SiteConfig:
    """A static site that opens from disk, without a server or a network: the run, all features, search, graphs."""

    shard: int = field(default=256, validator=[validators.ge(1), validators.le(65536)])
    """Features in a file. They are loaded together when one of them is opened."""
    graphs: list[Path] = field(factory=list)
    """Attribution graphs to show: JSON files of circuit-tracer."""


def build_report(config: ReportConfig, context: Context) -> Any:
    from clt_reports.stage import ReportStage

    return ReportStage(config, context)


def build_site(config: SiteConfig, context: Context) -> Any:
    from clt_reports.site.write import Site

    return Site(config, context)


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("report", ReportConfig, build_report)]


@hookimpl
def clt_reports() -> list[Spec]:
    return [Spec("site", SiteConfig, build_site)]


@click.command("thresholds")
@with_trained()
@click.option("--out", type=click.Path(path_type=Path), help="The folder for the plot and the histograms.")
@click.option("--no-plot", is_flag=True, help="Print the table only, write no files.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_thresholds(trained: Trained, out: Path | None, no_plot: bool, as_json: bool) -> None:
    """Show how the thresholds of PLACE are distributed in each layer.

    Writes thresholds.png and a histogram for each layer for TensorBoard, into thresholds/ in the run's folder or into
    --out.
    """
    from clt_reports.thresholds import report

    if out is None and trained.run is not None:
        out = trained.run / "thresholds"
    click.echo(report(trained.transcoder(), None if no_plot else out, as_json=as_json))


@click.command("top-activations")
@with_trained()
@click.option("--features", required=True, metavar="LAYER:FEATURE,...", help="Which features: 0:17,2:5-9.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A new JSON file for all of it.")
@click.option("--tokens", default=65536, show_default=True, type=click.IntRange(min=1), help="Held-out tokens to read.")
@click.option("--top", default=10, show_default=True, type=click.IntRange(min=1), help="Examples of each feature.")
@click.option(
    "--window", default=10, show_default=True, type=click.IntRange(min=0), help="Neighbouring tokens on each side."
)
def top_activations(trained: Trained, features: str, out: Path | None, tokens: int, top: int, window: int) -> None:
    """Show where features of PLACE are most active: the tokens, their neighbours, and the values there."""
    from clt_reports.contexts import as_text, find_top, parse, write

    transcoder = trained.transcoder()
    chosen = parse(features, transcoder.n_layers, transcoder.n_features)
    with trained.source() as source:
        result = find_top(transcoder, source, chosen, tokens=tokens, top=top, window=window)
    if out is not None:
        write(result, out)
    click.echo(as_text(result))


@hookimpl
def clt_commands() -> list[click.Command]:
    # Not called `thresholds`: that name of this package is the module.
    return [show_thresholds, top_activations]
