"""The command `example`: `python -m clt_plugins example RECIPE`, how many tokens a run reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from clt_plugins import hookimpl, with_recipe

if TYPE_CHECKING:
    from clt_plugins import Plugins, Recipe


@click.command("example")
@click.option("--per-feature", is_flag=True, help="For each feature of a layer, on average.")
@with_recipe
def example(recipe: Recipe, plugins: Plugins, per_feature: bool) -> None:
    """Print how many tokens the run that RECIPE describes is trained on."""
    # Import torch and the like here and not at the top: every command imports every plugin.
    tokens = recipe.train.steps * recipe.train.batch_tokens
    click.echo(f"{tokens / recipe.transcoder.features:g}" if per_feature else tokens)


@hookimpl
def clt_commands() -> list[click.Command]:
    return [example]
