"""The commands: arguments only; what they do is imported when they run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins import Refused, verbose, with_recipe

if TYPE_CHECKING:
    from clt_plugins.recipe.read import Recipe
    from clt_plugins.registry.plugins import Plugins


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
@click.option("--to", "url", metavar="URL", help="Upload it as well, to a server started with `serve`.")
def generate(
    recipe: Recipe, plugins: Plugins, out: Path, chunk_mb: float, block_rows: int | None, url: str | None, **rest: Any
) -> None:
    """Store the activations of RECIPE's source as a data set.

    Run it again to go on after an interruption. With `torchrun`, each process writes its share. The token for --to is
    read from CLT_TOKEN; the data set has the folder's name there.
    """
    from clt_datasets.make.generate import generate as write

    rest |= {"chunk_bytes": int(chunk_mb * 2**20), "block_rows": block_rows or 0}
    if url is None:
        write(recipe, plugins, out, **rest)
        return
    from clt_datasets.net.client import Connection

    connection = Connection(url, out.resolve().name, patience_s=600)
    try:
        write(recipe, plugins, out, written=connection.put, **rest)
    finally:
        connection.close()


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every row and check it.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@verbose
def inspect(dataset: Path, verify: bool, as_json: bool) -> None:
    """Show what DATASET holds: counts, statistics, the first rows. Ends with 1 if something is damaged."""
    from clt_datasets.make.inspect import as_text
    from clt_datasets.make.inspect import inspect as look

    found = look(dataset, verify=verify)
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found))
    if found["faults"]:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--memory-mb", type=click.FloatRange(min=0, min_open=True), default=2048, show_default=True)
@verbose
def scramble(source: Path, out: Path, seed: int, memory_mb: float) -> None:
    """Write the rows of the data set IN to OUT, in one random order of all. Needs twice its room on the disk."""
    from clt_datasets.make.scramble import scramble as write

    write(source, out, seed, memory=int(memory_mb * 2**20))


@click.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine only with a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8200, show_default=True, help="0: any that is free.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Its first line instead of CLT_TOKEN.")
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM file; then it speaks https.")
@click.option("--key", type=click.Path(path_type=Path), help="PEM file of the certificate's private key.")
@click.option(
    "--max-upload-mb", type=click.IntRange(1), default=8192, show_default=True, help="The largest file taken."
)
@click.option(
    "--page-cache",
    is_flag=True,
    help="Read blocks through the system's page cache: where the data fit into free memory.",
)
@verbose
def serve(
    root: Path,
    host: str,
    port: int,
    token_file: Path | None,
    certificate: Path | None,
    key: Path | None,
    max_upload_mb: int,
    page_cache: bool,
) -> None:
    """Serve the data sets below ROOT over HTTP.

    The bearer token in CLT_TOKEN is demanded from everybody, if there is one; without it nobody can write.
    """
    import ssl

    from clt_datasets.net.serve import serve as run

    token = os.environ.get("CLT_TOKEN", "")
    if token_file is not None:
        token = _first_line(token_file)
    tls = None
    if certificate is not None or key is not None:
        if certificate is None or key is None:
            raise ValueError("--certificate and --key: give both")
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise Refused("--certificate", f"cannot use {certificate} and {key}: {error}") from error
    run(root, host, port, token, tls, max_upload=max_upload_mb * 2**20, page_cache=page_cache)


def _first_line(path: Path) -> str:
    try:
        token = path.read_text().partition("\n")[0].strip()
    except OSError as error:
        raise Refused("--token-file", f"cannot read {path}: {error.strerror}") from error
    if not token:
        raise Refused("--token-file", f"{path}: its first line is empty")
    return token
