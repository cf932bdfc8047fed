"""The commands' arguments. What they do is imported when they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clt_plugins import Refused, verbose, with_recipe

if TYPE_CHECKING:
    from clt_plugins import Plugins, Recipe


@click.command()
@with_recipe
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The data set's folder.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens to train on.  [default: as many as RECIPE trains on]")
@click.option("--held-out", type=click.IntRange(0), help="Held-out tokens.  [default: train.eval_tokens]")
@click.option(
    "--dtype",
    type=click.Choice(["source", "float32", "float16", "bfloat16", "int8"]),
    default="source",
    show_default=True,
    help="The stored type; int8 has a scale per layer. The manifest says what rounding costs.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    default="none",
    show_default=True,
    help="Of the chunks; slower to read.",
)
@click.option(
    "--chunk-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=256,
    show_default=True,
    help="The size of a file, before conversion to --dtype.",
)
@click.option("--block-rows", type=click.IntRange(1), help="Rows read and checked together.  [default: 4 MiB]")
@click.option("--to", "url", metavar="URL", help="Also upload it, to a server started with `serve`.")
@click.option("--verify", is_flag=True, help="Read every row that is there, also of files that have not changed.")
def generate(
    recipe: Recipe,
    plugins: Plugins,
    out: Path,
    tokens: int | None,
    held_out: int | None,
    dtype: str,
    compression: str,
    chunk_mb: float,
    block_rows: int | None,
    url: str | None,
    verify: bool,
) -> None:
    """Store the activations of RECIPE's source as a data set.

    Run it again to continue after an interruption, or to replace chunks that are missing or damaged. With `torchrun`,
    each process writes its share. The token for --to is read from CLT_TOKEN; on the server, the data set has the
    folder's name.
    """
    from clt_datasets.make.generate import generate as run
    from clt_datasets.net.client import Client
    from clt_datasets.net.interrupts import closes
    from clt_datasets.net.limits import LARGEST_BLOCK

    client = None
    if url is not None:
        client = Client(url, out.resolve().name, patience_s=600, options=("--to", "--out"))
    # The thread that uploads would otherwise wait for a server that is down, and the command for the thread.
    uploads: dict[str, Any] = {}
    if client is not None:
        uploads = {"written": client.put, "largest_block": LARGEST_BLOCK}
    with closes(client):
        run(
            recipe,
            out,
            tokens=tokens,
            held_out=held_out,
            dtype=dtype,
            compression=compression,
            chunk_bytes=int(chunk_mb * 2**20),
            block_rows=block_rows or 0,
            verify=verify,
            **uploads,
        )


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--memory-mb", type=click.FloatRange(min=0, min_open=True), default=2048, show_default=True)
@verbose
def scramble(source: Path, out: Path, seed: int, memory_mb: float) -> None:
    """Write the rows of the data set IN to OUT, all in one random order. The disk needs twice the size of IN."""
    from clt_datasets.make.scramble import scramble as run

    run(source, out, seed, memory=int(memory_mb * 2**20))


@click.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Other machines can connect only with a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8200, show_default=True, help="0: any free one.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Its first line is used instead of CLT_TOKEN.")
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM file; serves https.")
@click.option("--key", type=click.Path(path_type=Path), help="PEM file of the certificate's private key.")
@click.option(
    "--max-upload-mb", type=click.IntRange(1), default=8192, show_default=True, help="The largest file accepted."
)
@click.option(
    "--quota-mb",
    type=click.IntRange(1),
    help="What all files below ROOT may take; uploads beyond it are refused.  "
    "[default: uploads leave 5 % of the disk free, or 10 GB]",
)
@click.option(
    "--page-cache",
    is_flag=True,
    help="Read blocks through the system's page cache: faster if the data fit into free memory.",
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
    quota_mb: int | None,
    page_cache: bool,
) -> None:
    """Serve the data sets below ROOT over HTTP.

    If there is a token in CLT_TOKEN, all requests need it. Without a token nobody can write.
    """
    import ssl

    from clt_datasets.net.serve import serve as run
    from clt_datasets.net.token import check_token, read_token

    token = os.environ.get("CLT_TOKEN", "").strip()
    if token_file is not None:
        token = read_token(token_file)
    elif token:
        check_token(token, "CLT_TOKEN")
    tls = None
    if certificate is not None or key is not None:
        if certificate is None or key is None:
            missing, other = ("--key", "--certificate") if key is None else ("--certificate", "--key")
            raise Refused(missing, f"needed together with {other}")
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise Refused("--certificate", f"cannot use {certificate} and {key}: {error}") from error
    quota = None if quota_mb is None else quota_mb * 2**20
    run(root, host, port, token, tls, max_upload=max_upload_mb * 2**20, quota=quota, page_cache=page_cache)


def _no_password() -> str:
    # OpenSSL would ask for it at the terminal.
    raise Refused("--key", "it is protected by a password: give one without, readable by you alone")
