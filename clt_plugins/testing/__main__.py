"""`python -m clt_plugins.testing PLUGIN`: the kit without pytest. Ends with 1 if a case fails."""

from __future__ import annotations

import io
import json
import traceback
from contextlib import redirect_stderr, redirect_stdout
from unittest import SkipTest

import click

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
    for case in cases(plugin, settings=json.loads(settings)):
        if word not in str(case):
            continue
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


if __name__ == "__main__":
    main()
