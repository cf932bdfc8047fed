"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clt_plugins.cli.options import with_plugins
from clt_plugins.errors import ExitCode, Refused

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read all of it and check it.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@with_plugins
def inspect(plugins: Plugins, place: Path, verify: bool, as_json: bool) -> None:
    """Say what PLACE is: a run, a transcoder, another tool's folder of one, or a data set.

    Of a transcoder: format, sizes, activation, thresholds, what it reads and writes, types, bytes. Of a data set:
    counts, statistics, the first rows. The exit code is 1 if something is damaged.
    """
    if not place.exists():
        raise Refused(place, "no such folder")
    inspector = next((each for each in plugins.inspectors() if each.recognises(place)), None)
    if inspector is not None:
        inspected = inspector.inspect(place, verify=verify)
    else:
        from clt_plugins.finished.inspect import inspect_transcoder

        inspected = inspect_transcoder(place, plugins, verify=verify)
    click.echo(json.dumps(dict(inspected.data), indent=1) if as_json else inspected.text)
    if inspected.faults:
        raise click.exceptions.Exit(ExitCode.FAILED)
