"""The command `collect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from clt_plugins import CollectionInfo, Refused, run_alone

if TYPE_CHECKING:
    from clt_plugins import Trained


def run(trained: Trained, out: Path | None, as_json: bool) -> None:
    """Collect into a folder.

    Raises:
        Refused: it is not known which folder, or something else is in it.
    """
    folder = out if out is not None else trained.collected_folder()
    if folder is None:
        raise Refused(trained.folder, "is in no run: say with --out where to write")
    if folder.exists() and not (folder / "collected.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise Refused(folder, "already there, and no store: give another folder with --out")

    def show(text: str, info: CollectionInfo) -> None:
        click.echo(json.dumps(attrs.asdict(info), indent=2) if as_json else text)

    kept = run_alone(trained, "collect", folder, show, keep=True) is None
    click.echo(f"{folder}: there already, of this transcoder with these settings" if kept else f"in {folder}", err=True)
