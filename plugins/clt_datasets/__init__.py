"""Stored activations: written once by `generate`, trained on many times from a folder or a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl

if TYPE_CHECKING:
    import click

    from clt_plugins import Context


@frozen(kw_only=True)
class LocalConfig:
    """A data set in a folder, made by `generate` or `scramble`: every row once per epoch, in a new order each time.

    Blocks from all chunks are read into a buffer and shuffled there, while the rows of the buffer before are used.
    Memory at most: two buffers of `buffer_tokens` rows, four batches, and 64 MiB. A row has 2 x layers x d_model
    numbers in the stored type (int8 becomes float32 when it is read). For GPT-2 small in bfloat16, the default buffer
    and batches of 4,096 tokens this is 1.9 GB.
    """

    path: Path
    """The data set's folder."""
    buffer_tokens: int = field(default=16384, validator=validators.gt(0))
    """Rows that are shuffled together, on each rank; at least a batch."""
    on_corrupt: Literal["stop", "skip"] = field(default="stop", metadata=FREE_ON_RESUME)
    """What to do when stored rows fail their checksum: stop the run, or warn and train on other rows of the same buffer
    instead."""
    page_cache: bool = field(default=False, metadata=FREE_ON_RESUME)
    """Read through the system's page cache: faster from the second epoch on if the data set fits into free memory.
    Otherwise rows are read past the cache, at the disk's own rate; the cache stays free for other programs."""


@frozen(kw_only=True)
class RemoteConfig:
    """A data set on a server started with `serve`: the same rows in the same order as `local`.

    A download that breaks off continues where it broke off, also if the server restarts. Every block is checked
    against the manifest. The token is read from the environment variable CLT_TOKEN. Memory: like `local`.
    """

    url: str = field(metadata=FREE_ON_RESUME)
    """The server, `http://HOST:PORT` or `https://HOST:PORT`."""
    dataset: str
    """The data set's name on the server."""
    buffer_tokens: int = field(default=16384, validator=validators.gt(0))
    """Rows that are shuffled together, on each rank; at least a batch."""
    on_corrupt: Literal["stop", "skip"] = field(default="stop", metadata=FREE_ON_RESUME)
    """What to do when rows are damaged on the server: stop the run, or warn and train on other rows of the same buffer
    instead."""
    patience_s: float = field(default=600.0, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """The run stops after so many seconds without anything new from the server."""
    ca_file: Path | None = field(default=None, metadata=FREE_ON_RESUME)
    """Certificates to trust, for a server with a self-signed certificate."""


def build_local(config: LocalConfig, context: Context) -> Any:
    from clt_datasets.dataset import build_local

    return build_local(config, context)


def build_remote(config: RemoteConfig, context: Context) -> Any:
    from clt_datasets.net.remote import build_remote

    return build_remote(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("local", LocalConfig, build_local), Spec("remote", RemoteConfig, build_remote)]


@hookimpl
def clt_commands() -> list[click.Command]:
    from clt_datasets.commands import generate, scramble, serve

    return [generate, scramble, serve]


@hookimpl
def clt_inspectors() -> list[Any]:
    from clt_datasets.inspector import DataSets

    return [DataSets()]
