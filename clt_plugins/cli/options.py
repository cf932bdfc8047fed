"""What commands share: the recipe argument, `--set`, `-p`, `--strict`, `-v`, also for commands that plugins add."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins

VERBOSE = "clt_plugins.verbose"
RECIPE = "clt_plugins.recipe"
NAMES = "clt_plugins.names"
"""The plugins that `-p` names before the command."""


def selected_plugins(names: Sequence[str], strict: bool = False) -> Plugins:
    """Load plugins as the `-p` options say: `no:NAME` blocks, anything else is loaded as well."""
    from clt_plugins.registry.plugins import load_plugins

    block = [name.removeprefix("no:") for name in names if name.startswith("no:")]
    return load_plugins(block=block, extra=[name for name in names if not name.startswith("no:")], strict=strict)


def _verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[VERBOSE] = True
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger("clt_plugins").setLevel(logging.DEBUG)


def _remember(context: click.Context, _: click.Parameter, value: str) -> str:
    context.meta[RECIPE] = value
    return value


verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_verbose,
    help="More messages; stack traces of errors.",
)


def _before(context: click.Context, _: click.Parameter, value: tuple[str, ...]) -> None:
    context.meta[NAMES] = value


def named(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `-p`."""
    text = "Load a module or a .py file as a plugin, or block a plugin."
    return click.option("-p", "names", multiple=True, metavar="[no:]NAME", help=text, **options)


named_before = named(expose_value=False, is_eager=True, callback=_before)
"""`-p` before the command: then the plugin's own commands are there too, and in `--help`."""


def with_plugins(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `-p`, `--strict` and `-v`; the command gets `plugins`."""

    @named()
    @click.option("--strict", is_flag=True, help="A plugin that fails to load is fatal.")
    @verbose
    @functools.wraps(command)
    def wrapped(*, names: tuple[str, ...], strict: bool, **rest: Any) -> Any:
        before = click.get_current_context().meta.get(NAMES, ())
        return command(plugins=selected_plugins((*before, *names), strict), **rest)

    return wrapped


def with_recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds RECIPE, `--set` and what `with_plugins` adds; the command gets `recipe` (typed) and `plugins`."""

    @with_stated
    @functools.wraps(command)
    def wrapped(*, recipe: str, settings: tuple[str, ...], plugins: Plugins, **rest: Any) -> Any:
        from clt_plugins.recipe.read import read_recipe

        return command(recipe=read_recipe(recipe, settings, plugins), plugins=plugins, **rest)

    return wrapped


def with_stated(command: Callable[..., Any]) -> Callable[..., Any]:
    """Like `with_recipe`, for recipes that may have `[sweep]`: the command gets `recipe` (the file), `settings` (the
    flags) and `plugins`."""

    @click.argument("recipe", metavar="RECIPE", callback=_remember)
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting: train.steps=100.")
    @with_plugins
    @functools.wraps(command)
    def wrapped(**rest: Any) -> Any:
        return command(**rest)

    return wrapped


def with_trained(*, converted: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds PLACE, `--recipe`, `--set` and what `with_plugins` adds; the command gets `trained`, a `Trained`.

    Args:
        converted: of a run that converted its transcoder, take the converted one.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.argument("place", type=click.Path(path_type=Path))
        @click.option("--recipe", type=click.Path(path_type=Path), help="Whose model and data to use; else the run's.")
        @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe.")
        @with_plugins
        @functools.wraps(command)
        def wrapped(
            *, place: Path, recipe: Path | None, settings: tuple[str, ...], plugins: Plugins, **rest: Any
        ) -> Any:
            from clt_plugins.finished.find import find_trained

            return command(trained=find_trained(place, plugins, recipe, settings, converted=converted), **rest)

        return wrapped

    return decorate
