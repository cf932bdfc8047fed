"""The commands. Messages go to stderr, results to stdout; an error is one line, without a stack trace unless `-v`."""

from __future__ import annotations

import errno
import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins.cli import finished, many
from clt_plugins.cli.inspect import inspect
from clt_plugins.cli.new import KINDS, new
from clt_plugins.cli.options import (
    NAMES,
    RECIPE,
    VERBOSE,
    named_before,
    selected_plugins,
    verbose,
    with_plugins,
    with_recipe,
)
from clt_plugins.cli.report import report
from clt_plugins.cli.stage import stage
from clt_plugins.contract.spec import __version__
from clt_plugins.distributed.signals import heard
from clt_plugins.errors import ExitCode, Fault, Faults, PluginError, Refused, Stopped, Unreachable, exhausted

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


class Commands(click.Group):
    """The engine's commands and those of plugins; turns exceptions into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        try:
            added = self._from_plugins(ctx)
        except PluginError as error:  # only a strict environment raises; help is shown all the same
            logger.warning("%s", error)
            added = {}
        return [*self.commands, *sorted(added.keys() - self.commands.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name) or self._from_plugins(ctx).get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A command may be that of a plugin which `-p` names only after it: `histogram RUN -p mine.py`."""
        if args and self.get_command(ctx, args[0]) is None and (names := _named_after(args)):
            ctx.meta[NAMES] = (*ctx.meta.get(NAMES, ()), *names)
            ctx.obj = None
            command = self.get_command(ctx, args[0])
            if command is not None and not any("-p" in parameter.opts for parameter in command.params):
                args = _without_names(args)
        return super().resolve_command(ctx, args)

    def _from_plugins(self, ctx: click.Context) -> dict[str, click.Command]:
        if ctx.obj is None:
            plugins = selected_plugins(ctx.meta.get(NAMES, ()))
            ctx.obj = plugins, plugins.commands(self.commands)
        return ctx.obj[1]

    @contextmanager
    def _naming(self, ctx: click.Context) -> Iterator[None]:
        """An error of a plugin's command names the plugin and the line."""
        try:
            yield
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception:
            name = ctx.invoked_subcommand
            if ctx.obj is None or name is None or name in self.commands:
                raise
            from clt_plugins.registry.build import naming_plugins

            with naming_plugins(ctx.obj[0].infos, phase=f"the command {name!r}"):
                raise

    def invoke(self, ctx: click.Context) -> Any:
        error: BaseException
        try:
            # SIGTERM is Ctrl-C: what is half written is cleaned up.
            with heard() as signals:
                signals.phase = "interrupted"
                with self._naming(ctx):
                    return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Stopped as stop:
            error, code, text = stop, stop.code, str(stop)
        except Faults as wrong:
            lines = [str(_located(fault, ctx.meta.get(RECIPE))) for fault in wrong.faults]
            error, code, text = wrong, ExitCode.USAGE, "\n".join(lines)
        except Unreachable as failure:
            error, code, text = failure, ExitCode.FAILED, str(failure)
        except OSError as failure:
            if failure.errno == errno.EPIPE:
                raise
            # One line also where a library's text has several, as HDF5's.
            error, code, text = failure, ExitCode.FAILED, " ".join(str(failure).splitlines())
        except PluginError as failure:
            origin = _located(Fault(failure.where, ""), ctx.meta.get(RECIPE)).origin
            error, code, text = failure, ExitCode.FAILED, f"{origin}: {failure}" if origin else str(failure)
        except Exception as failure:
            hint = "" if VERBOSE in ctx.meta else " (-v shows where)"
            text = exhausted(failure) or f"{type(failure).__name__}: {' '.join(str(failure).split())}{hint}"
            error, code = failure, ExitCode.FAILED
        if VERBOSE in ctx.meta:
            traceback.print_exception(error)
        if text:  # of several ranks only one speaks
            click.echo(text, err=True)
        raise click.exceptions.Exit(code)


def _located(fault: Fault, recipe: str | None) -> Fault:
    """A fault of a setting, with the recipe's file and line."""
    try:
        return _file_and_line(fault, recipe)
    except MemoryError:  # the fault itself is still told
        return fault


def _file_and_line(fault: Fault, recipe: str | None) -> Fault:
    from clt_plugins.cli.listing import tables
    from clt_plugins.recipe.read import locate

    return locate(fault, recipe) if recipe and fault.where and fault.where[0] in tables() else fault


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="clt-plugins %(version)s")
@named_before
@verbose
def main_group() -> None:
    """Train cross-layer transcoders, with everything that is a choice in a plugin."""


def _named_after(args: list[str]) -> list[str]:
    """What `-p` names among the arguments of a command."""
    names = [after for arg, after in pairwise(args) if arg == "-p"]
    return names + [arg[2:] for arg in args[1:] if arg.startswith("-p") and arg != "-p"]


def _without_names(args: list[str]) -> list[str]:
    return [arg for before, arg in pairwise(["", *args]) if not arg.startswith("-p") and before != "-p"]


class RunCommand(click.Command):
    """`--resume` may stand before RECIPE without taking it for the name of a checkpoint."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        name = re.compile(r"latest|(step_)?\d+")
        args = [
            "--resume=latest" if arg == "--resume" and not name.fullmatch(after) else arg
            for arg, after in pairwise([*args, ""])
        ]
        return super().parse_args(ctx, args)


@main_group.command(cls=RunCommand)
@with_recipe
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder; runs/<name>/<time> if not given.")
@click.option("--resume", metavar="[NAME]", help="Go on from the latest checkpoint in the folder, or from NAME.")
@click.option(
    "--accept",
    multiple=True,
    metavar="SETTING",
    help="With --resume: this setting, or the data that it names, may differ from the checkpoint's.",
)
@click.option("--dry-run", is_flag=True, help="Build everything, print sizes, train nothing.")
def run(
    recipe: Recipe,
    plugins: Plugins,
    out: Path | None,
    resume: str | None,
    accept: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Train the transcoder that RECIPE describes."""
    from clt_plugins.training import run as training

    if dry_run:
        from clt_plugins.training.plan.build import plan as predict
        from clt_plugins.training.plan.table import as_table

        click.echo(as_table(predict(recipe, plugins, built=True)))
        return
    if accept and resume is None:
        raise Refused("--accept", "says what may differ on --resume; without it there is nothing to differ from")
    training.run(recipe, out=out, resume=resume, accept=accept, plugins=plugins)


@main_group.command("plugins")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--check", is_flag=True, help="Also look for what is undocumented, and try out what other distributions offer."
)
@with_plugins
def plugins_command(plugins: Plugins, name: str | None, as_json: bool, check: bool) -> None:
    """List plugins and what they offer, or only what has NAME: a plugin, distribution, table or choice.

    Ends with 1 if a plugin failed to load, or if --check found something; the last lines say what it tried.
    """
    from clt_plugins.cli.listing import as_text, listing, undocumented
    from clt_plugins.testing.trial import trial

    plugins.commands(main_group.commands)  # so that one that fails is listed
    listed = listing(plugins, name)
    # The engine's own have been tried out by its tests, unless they are asked for.
    tried = trial(plugins, listed, own=name is not None) if check else []
    faults = undocumented(plugins) if check else []
    faults += [fault for each in tried for fault in each.faults]
    if as_json:
        checked = {"undocumented": faults, "tried": [each.data() for each in tried]} if check else {}
        click.echo(json.dumps({**listed, **checked}, indent=2))
    else:
        last = [*map(str, tried)] or ["tried nothing: no other distribution offers anything"] if check else []
        click.echo("\n".join([as_text(listed), *(f"! {fault}" for fault in faults), *last]))
    if listed["failures"] or faults:
        raise click.exceptions.Exit(ExitCode.FAILED)


@main_group.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What it offers.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder; ./NAME if not given.")
def new_command(name: str, kind: str, out: Path | None) -> None:
    """Write a plugin: an installable package NAME with a working example and its conformance test."""
    folder = new(name, kind, out, reserved=main_group.commands)
    click.echo(folder)
    click.echo(f"now: cd {folder} && pip install -e '.[dev]' && pytest", err=True)


@main_group.command()
@click.option("-o", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write to a new file.")
@with_plugins
def init(plugins: Plugins, file: Path | None) -> None:
    """Print a recipe made from the defaults, every setting explained."""
    from clt_plugins.cli.starter import starter

    text = starter(plugins)
    if file is None:
        click.echo(text, nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise Refused(file, "already there; give another name with -o") from None


_COMMANDS = (
    many.sweep, many.plan, many.validate, finished.convert, finished.evaluate, finished.export, inspect, report,
    stage,
)  # fmt: skip
for _command in _COMMANDS:
    main_group.add_command(_command)
