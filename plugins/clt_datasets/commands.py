"""The commands: arguments only; what they do is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins import with_recipe

if TYPE_CHECKING:
    from clt_plugins.loading import Plugins
    from clt_plugins.recipe import Recipe


@click.command()
@with_recipe
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The data set's folder.")
@click.option("--tokens", type=click.IntRange(1), help="To train on; as many as RECIPE trains on if not given.")
@click.option("--held-out", type=click.IntRange(0), help="Held-out tokens; train.eval_tokens if not given.")
@click.option(
    "--dtype",
    type=click.Choice(["source", "float32", "float16", "bfloat16", "int8"]),
    default="source",
    show_default=True,
    help="The stored type; int8 has a scale per layer. What rounding costs is written in the manifest.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    default="none",
    show_default=True,
    help="Of the chunks; slower to read.",
)
@click.option("--chunk-mb", type=click.FloatRange(min=0, min_open=True), default=256, show_default=True)
@click.option("--block-rows", type=click.IntRange(1), help="Rows read and checked together; 4 MiB if not given.")
def generate(recipe: Recipe, plugins: Plugins, chunk_mb: float, block_rows: int | None, **rest: Any) -> None:
    """Store the activations of RECIPE's source as a data set.

    Run it again to go on after an interruption. With `torchrun`, each process writes its share.
    """
    from clt_datasets.generate import generate as write

    write(recipe, plugins, chunk_bytes=int(chunk_mb * 2**20), block_rows=block_rows or 0, **rest)
