"""Reading the files of other tools."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import nn

from clt_plugins.errors import Refused
from clt_plugins.model.normalisation.stored import check_stored, detected_normalisation
from clt_plugins.model.parameters import check_finite, give_memory
from clt_plugins.model.saved.bare import Make, check_sizes, without_memory
from clt_plugins.model.saved.description import Description
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.results.exporter import Imported, ReadsBack
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

LAZY_ABOVE = 2**31
"""Bytes of a decoder in another tool's folder above which it stays on disk."""


def find_reader(folder: Path, plugins: Plugins) -> tuple[str, ReadsBack]:
    """The name and the reader of the first format that recognises a folder.

    Raises:
        Refused: none does.
        OSError: none does, and a file could not be read.
    """
    if not folder.exists():
        raise Refused(folder, "no such folder")
    unread: OSError | None = None
    for name, make in plugins.readers().items():
        try:
            reader: ReadsBack = make()
            if reader.recognises(folder):
                return name, reader
        except Exception as error:
            # One broken plugin must not stop the others from reading.
            logger.warning("%s: the reader of %r cannot look at it: %s", folder, name, error)
            unread = error if isinstance(error, OSError) else unread
    if unread is not None:
        raise unread
    raise Refused(folder, "not a transcoder: no transcoder.json in it, nor another tool's format")


def import_transcoder(
    make: Make, folder: Path, *, device: str, plugins: Plugins, kernels: str, lazy: bool | None
) -> Any:
    """A transcoder from another tool's files.

    Raises:
        Refused: no exporter recognises them, or they are not complete; says what is there.
    """
    imported: Imported = find_reader(folder, plugins)[1].read(folder)
    description = Description(
        layers=imported.n_layers,
        d_model=imported.d_model,
        features=imported.n_features,
        dtype="float32",
        normalisation=dict(imported.normalisation or {"name": detected_normalisation(imported)}),
        model=dict(imported.model),
        activation=dict(imported.activation),
        tying=dict(imported.tying),
    )
    check_sizes(description, folder)
    transcoder = without_memory(make, description, folder, device, plugins, kernels)
    on_disk = imported.decoder is not None and (imported.decoder_bytes > LAZY_ABOVE if lazy is None else lazy)
    if on_disk:
        # The tying is replaced before the rest gets memory, so that the decoder gets none.
        transcoder.tying = cast(Any, nn.Module())
    # Statistics that the folder lacks stay as a new transcoder has them.
    first = build(transcoder.choices["normalisation"], attrs.evolve(transcoder.context, device=torch.device(device)))
    give_memory(transcoder, device)
    transcoder.normaliser = first
    transcoder.target_variance.fill_(1)
    if on_disk:
        assert imported.decoder is not None
        transcoder.tying = imported.decoder(transcoder.context)
    _fill(transcoder, imported, folder, skip=set(transcoder.tying.views()) if on_disk else set())
    check_stored(transcoder, folder)
    logger.info("%s: %s%s", folder, imported.kind, ", its decoder left on disk" if on_disk else "")
    return transcoder.eval()


@torch.no_grad()
def _fill(transcoder: Any, imported: Imported, folder: Path, skip: set[str]) -> None:
    """Copy another tool's tensors into a transcoder; those that it lacks keep their first values.

    Raises:
        Refused: a tensor is of another shape, or what was learned is not finite; names it.
    """
    for name, target in transcoder.tensors(skip).items():
        value = imported.tensor(name)
        if value is None:
            continue
        if value.shape != target.shape:
            raise Refused(folder, f"{name} is {list(value.shape)}, expected {list(target.shape)}")
        check_finite(transcoder, name, value, folder)
        target.copy_(value)
