"""The activation source `crosslayer-coding`: data sets made by the reference library of that name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class CrosslayerCodingConfig:
    """A folder of `chunk_N.h5` or `.hdf5` files with metadata.json, as crosslayer-coding writes it.

    Every row once per epoch, in a new order each time, chunks mixed. The files have no checksums, so damage is seen
    only where HDF5 sees it. Memory: two buffers of `buffer_tokens` rows and three batches.
    """

    path: Path
    """The folder with metadata.json and index.bin."""
    held_out_tokens: int = field(default=16384, validator=validators.gt(0))
    """How many of the data set's last rows are kept for evaluation and never trained on. (The library shuffles rows
    within a chunk, so of the chunk they are cut from, other rows of the same documents may be trained on.)"""
    buffer_tokens: int = field(default=16384, validator=validators.gt(0))
    """Rows that are shuffled together, on each rank; at least a batch."""


def build_crosslayer_coding(config: CrosslayerCodingConfig, context: Context) -> Any:
    from clt_crosslayer_coding.source import build

    return build(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("crosslayer-coding", CrosslayerCodingConfig, build_crosslayer_coding)]
