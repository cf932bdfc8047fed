"""Commands that show what a trained transcoder has learned: `thresholds` and `top-activations`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clt_plugins import hookimpl, with_trained

if TYPE_CHECKING:
    from clt_plugins import Trained


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
