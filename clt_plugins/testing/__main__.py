"""`python -m clt_plugins.testing PLUGIN`: the kit without pytest. Ends with 1 if a case fails, with 2 if
what was asked for does not exist."""

from __future__ import annotations

import difflib
import io
import json
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import SkipTest

import click

from clt_plugins.errors import ExitCode, Faults, Refused
from clt_plugins.testing.case import Case
from clt_plugins.testing.cases import cases
from clt_plugins.testing.report import Nonconformance


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("plugin")
@click.option("--settings", default="{}", metavar="JSON", help='Settings by choice: {"topk": {"k": 4}}.')
@click.option("-k", "word", default="", metavar="TEXT", help="Only cases whose name holds TEXT.")
@click.option("-v", "verbose", is_flag=True, help="With each failure what was printed, and the stack trace.")
def main(plugin: str, settings: str, word: str, verbose: bool) -> None:
    """Check every choice of PLUGIN: an installed plugin, a distribution, or a module."""
    failed = 0
    try:
        chosen = _chosen(cases(plugin, settings=_parsed(settings)), word)
    except Faults as error:
        click.echo(str(error), err=True)
        raise SystemExit(int(ExitCode.USAGE)) from None
    for case in chosen:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                case.run()
            click.echo(f"pass  {case}")
        except SkipTest as reason:
            click.echo(f"skip  {case}: {reason}")
        except Nonconformance as error:
            failed += 1
            click.echo(f"FAIL  {case}\n{error}\n")
            if verbose:
                click.echo(f"{printed.getvalue()}{''.join(traceback.format_exception(error.__context__))}")
    raise SystemExit(1 if failed else 0)


def _parsed(settings: str) -> dict[str, Any]:
    """
    Raises:
        Refused: it is no JSON, or no table.
    """
    try:
        found = json.loads(settings)
    except json.JSONDecodeError as error:
        raise Refused("--settings", f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused("--settings", f'expected {{"CHOICE": {{"SETTING": value}}}}, got {settings:.100}')
    return found


def _chosen(found: list[Case], word: str) -> list[Case]:
    """The cases whose name holds the word. What cannot be loaded has one case, which is always told.

    Raises:
        Refused: there is none; with the nearest names.
    """
    chosen = [case for case in found if word in str(case) or case.problem]
    if chosen:
        return chosen
    names = list(dict.fromkeys(part for case in found for part in (str(case), case.label, case.check)))
    near = difflib.get_close_matches(word, names, n=3)
    text = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(map(str, found))}"
    raise Refused("-k", f"no case's name holds {word!r}: {text}")


if __name__ == "__main__":
    main()
