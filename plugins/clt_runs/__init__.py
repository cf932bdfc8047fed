"""The command `runs`: which runs there are, how far they are, and how good; and what two of them differ in."""

from __future__ import annotations

from pathlib import Path

import click

from clt_plugins import hookimpl, verbose

KEYS = ("name", "status", "step", "nmse", "l0", "ce_recovered", "tokens_per_s", "age", "size")


@click.command("runs")
@click.argument("folder", metavar="DIR", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--sort",
    default="name",
    show_default=True,
    metavar="COLUMN",
    help=f"By a column, the smallest first; -COLUMN for the largest: {', '.join(KEYS)}.",
)
@click.option("--compare", nargs=2, metavar="A B", help="What two of them differ in: their names, or their folders.")
@verbose
def show_runs(folder: Path, as_json: bool, sort: str, compare: tuple[str, str] | None) -> None:
    """List the runs below DIR (by default `runs`): status, step, scores, speed, age and size.

    NMSE and L0 are those of the evaluation, else of the last held-out tokens in training; CE is the share of the
    cross-entropy recovered that zero-ablation loses. A run is running, ended, interrupted, failed, or broken off:
    its process died, and `run --resume` goes on.
    """
    from clt_runs.compare import compared
    from clt_runs.find import find_runs, one_run
    from clt_runs.table import as_data, as_table, in_order

    if compare is not None:
        click.echo(compared(*(one_run(folder, name) for name in compare), as_json=as_json))
        return
    runs = in_order(find_runs(folder), sort)
    click.echo(as_data(runs) if as_json else as_table(runs, folder))


@hookimpl
def clt_commands() -> list[click.Command]:
    return [show_runs]
