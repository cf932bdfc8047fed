"""Activations that are stored: written once by `generate`, trained on many times from a folder or a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    import click

    from clt_plugins import Context


@frozen(kw_only=True)
class LocalConfig:
    """A data set in a folder, made by `generate` or `scramble`: every row once per epoch, in a new order each time.

    Blocks from all chunks are read into a buffer and shuffled there while the buffer before is used up. Memory: two
    buffers of `buffer_tokens` rows and three batches; a row has 2 x layers x d_model numbers in the stored type (int8
    becomes float32 on the way). For GPT-2 small in bfloat16 and the default size that is 1.2 GB and the batches.
    """

    path: Path
    """The data set's folder."""
    buffer_tokens: int = field(default=16384, validator=validators.gt(0))
    """Rows that are shuffled together, on each rank; at least a batch."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do when stored rows fail their checksum: stop the run, or warn and train on other rows of the same buffer
    in their place."""


def build_local(config: LocalConfig, context: Context) -> Any:
    from clt_datasets.folder import build_local

    return build_local(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("local", LocalConfig, build_local)]


@hookimpl
def clt_commands() -> list[click.Command]:
    from clt_datasets.commands import generate

    return [generate]
