"""Commands for recipes that may be of many transcoders: sweep, plan, validate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from clt_plugins.cli.options import with_stated
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.recipe.sweep import Sweep
    from clt_plugins.registry.plugins import Plugins

AT_ONCE = click.option(
    "--at-once",
    type=int,
    metavar="N",
    help="Of a sweep, train N transcoders at a time: less memory, and activations are made for each N again.",
)


@click.command()
@with_stated
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder, with one in it for each run.")
@click.option("--resume", is_flag=True, help="Go on from the latest checkpoint of each transcoder in the folder.")
@click.option(
    "--accept",
    multiple=True,
    metavar="SETTING",
    help="With --resume: this setting, or the data that it names, may differ from the checkpoints'.",
)
@AT_ONCE
def sweep(
    recipe: str,
    settings: tuple[str, ...],
    plugins: Plugins,
    out: Path,
    resume: bool,
    accept: tuple[str, ...],
    at_once: int | None,
) -> None:
    """Train all transcoders that [sweep] of RECIPE describes, on one stream of activations.

    Each gets a folder below --out, as `run` makes it. At the end frontier.json, .html and .png show L0, NMSE and
    cross-entropy of all.
    """
    from clt_plugins.recipe.read import read_recipe, read_sweep
    from clt_plugins.training.sweep import run as training

    if accept and not resume:
        raise Refused("--accept", "says what may differ on --resume; without it there is nothing to differ from")
    read = read_sweep(recipe, settings, plugins)
    if read is None:
        read_recipe(recipe, settings, plugins)  # what else is wrong comes first
        raise Refused("sweep", "missing: list settings with their values in [sweep], or train one transcoder by `run`")
    training.sweep(read, out=out, resume=resume, accept=accept, at_once=at_once, plugins=plugins)


@click.command()
@with_stated
@click.option("--n-layers", type=int, metavar="N", help="Layers of the language model, where it is not at hand.")
@click.option("--d-model", type=int, metavar="D", help="Its width.")
@click.option("--gpu", metavar="NAME", help="Times and memory on a GPU, by a model of it: h100, a100, 4090, ...")
@click.option("--gpus", type=int, metavar="N", help="How many of them share the features.")
@click.option("--measure", "measured", is_flag=True, help="Times on this machine, measured in some seconds.")
@AT_ONCE
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plan(
    recipe: str,
    settings: tuple[str, ...],
    plugins: Plugins,
    as_json: bool,
    at_once: int | None,
    **options: Any,
) -> None:
    """Predict what RECIPE needs: memory, disk, time, and what would be faster. Trains nothing, loads no weights."""
    from clt_plugins.files.records import json_text
    from clt_plugins.recipe.read import read_recipe, read_sweep
    from clt_plugins.training.plan.build import plan as predict
    from clt_plugins.training.plan.table import as_table

    many = read_sweep(recipe, settings, plugins)
    if many is not None:
        click.echo(_of_sweep(many, plugins, at_once, as_json, options))
        return
    if at_once is not None:
        raise Refused("--at-once", "is for recipes with [sweep]: this one is of one transcoder")
    needs = predict(read_recipe(recipe, settings, plugins), plugins, **options)
    click.echo(json_text(needs) if as_json else as_table(needs))


def _of_sweep(many: Sweep, plugins: Plugins, at_once: int | None, as_json: bool, options: dict[str, Any]) -> str:
    from clt_plugins.files.records import json_text
    from clt_plugins.training.plan.build import plan as predict
    from clt_plugins.training.plan.machines import USABLE
    from clt_plugins.training.sweep.memory import as_table, most_at_once, plan_sweep

    if options.get("gpus"):
        raise Refused("--gpus", "a sweep trains on one: leave it out")
    needs = plan_sweep(many, plugins, at_once, lambda member: predict(member.recipe, plugins, **options))
    speed = needs.members[0].needs.speed
    if speed is not None and speed.device.memory is not None:
        available = int(USABLE * speed.device.memory)
        most = most_at_once(many, needs, available)
        needs = attrs.evolve(needs, fits=needs.total_bytes <= available, most_at_once=most)
    return json_text(needs) if as_json else as_table(needs)


@click.command()
@with_stated
def validate(recipe: str, settings: tuple[str, ...], plugins: Plugins) -> None:
    """Check RECIPE and print it with every default written out; of one with [sweep], list its transcoders."""
    from clt_plugins.recipe.read import as_toml, read_recipe, read_sweep
    from clt_plugins.toml import inline

    many = read_sweep(recipe, settings, plugins)
    if many is None:
        click.echo(as_toml(read_recipe(recipe, settings, plugins)), nl=False)
        return
    click.echo(f"{len(many.members)} transcoders")
    for member in many.members:
        click.echo(f"  {member.label}: {inline(member.settings)[1:-1]}")
