"""A transcoder's files: `transcoder.safetensors` (of several ranks a slice each) and `transcoder.json`; and reading
the files of other tools.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from clt_plugins.contract.spec import __version__
from clt_plugins.errors import Refused
from clt_plugins.files.folders import FORMAT, read_json, verify, whole_folder, write_json
from clt_plugins.files.sliced import SlicedTensors, put_tensors
from clt_plugins.model.devices import bare_context, make_kernels, make_parallel
from clt_plugins.model.parameters import give_memory
from clt_plugins.recipe.structure import plain, structure_choice
from clt_plugins.registry.plugins import load_plugins

if TYPE_CHECKING:
    from clt_plugins.contract.abilities import ReadsBack
    from clt_plugins.contract.interfaces import Imported
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

Make = Callable[..., Any]
"""The class of transcoder: this module stands below it, so it is handed in, and a transcoder is `Any` here."""

LAZY_ABOVE = 2**31
"""Bytes of a decoder in another tool's folder above which it stays on disk."""


def put_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder's two files into a folder that `whole_folder` made."""
    parallel = transcoder.context.parallel
    put_tensors(folder, "transcoder", transcoder.tensors(), transcoder.feature_axes(), parallel, transcoder.n_features)
    if parallel.rank > 0:
        return
    described = {
        "format": FORMAT,
        "clt_plugins": __version__,
        "layers": transcoder.n_layers,
        "d_model": transcoder.d_model,
        "features": transcoder.n_features,
        "dtype": str(transcoder.context.dtype).removeprefix("torch."),
        "normalisation": transcoder.normalisation,
        "model": transcoder.model_described(),
        **{slot: plain(chosen) for slot, chosen in transcoder.choices.items()},
    }
    write_json(folder / "transcoder.json", described)


def save_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder as a folder, whole or not at all; on several ranks, each its slices."""
    with whole_folder(folder, transcoder.context.parallel) as partial:
        put_transcoder(transcoder, partial)


def load_transcoder(
    make: Make, folder: Path, *, device: str, plugins: Plugins | None, kernels: str, lazy: bool | None
) -> Any:
    """See `CrossLayerTranscoder.load`."""
    plugins = plugins or load_plugins()
    if not (folder / "transcoder.json").is_file():
        return _import(make, folder, device=device, plugins=plugins, kernels=kernels, lazy=lazy)
    verify(folder)
    described = read_json(folder / "transcoder.json")
    if described.get("format") != FORMAT:
        raise Refused(folder, f"written in format {described.get('format')}, this version reads {FORMAT}")
    transcoder = _without_memory(make, described, str(folder / "transcoder.json"), device, plugins, kernels)
    give_memory(transcoder, device)
    copy_tensors(SlicedTensors.find(folder, "transcoder"), transcoder)
    return transcoder.eval()


def _without_memory(
    make: Make, described: Mapping[str, Any], origin: str, device: str, plugins: Plugins, kernels: str
) -> Any:
    """A transcoder as `transcoder.json` describes it, on the device "meta"."""
    context = bare_context(
        torch.device("meta"),
        dtype=getattr(torch, described["dtype"]),
        kernels=make_kernels(kernels, torch.device(device), plugins),
        parallel=make_parallel("single", plugins),
        n_layers=described["layers"],
        d_model=described["d_model"],
        n_features=described["features"],
    )
    activation, tying = (structure_choice(plugins, slot, described[slot], origin) for slot in ("activation", "tying"))
    transcoder = make(context, activation, tying, normalisation=described["normalisation"])
    transcoder.described_model = dict(described["model"])
    return transcoder


def _reader(folder: Path, plugins: Plugins) -> ReadsBack:
    """The reader of the first exporter that recognises a folder.

    Raises:
        Refused: none does.
    """
    if not folder.exists():
        raise Refused(folder, "no such folder")
    for choice in plugins.choices("exports").values():
        if choice.spec.reader is None:
            continue
        try:
            reader: ReadsBack = choice.spec.reader()
            if reader.recognises(folder):
                return reader
        except Exception as error:
            # One broken plugin must not stop the others from reading.
            logger.warning("%s: %r of %s cannot look at it: %s", folder, choice.spec.name, choice, error)
    raise Refused(folder, "not a transcoder: no transcoder.json in it, nor another tool's format")


def _import(make: Make, folder: Path, *, device: str, plugins: Plugins, kernels: str, lazy: bool | None) -> Any:
    """A transcoder from another tool's files.

    Raises:
        Refused: no exporter recognises them, or they are not complete; says what is there.
    """
    imported: Imported = _reader(folder, plugins).read(folder)
    described = {
        "dtype": "float32",
        "normalisation": "none",
        "layers": imported.n_layers,
        "d_model": imported.d_model,
        "features": imported.n_features,
        "activation": imported.activation,
        "tying": imported.tying,
        "model": imported.model,
    }
    transcoder = _without_memory(make, described, str(folder), device, plugins, kernels)
    on_disk = imported.decoder is not None and (imported.decoder_bytes > LAZY_ABOVE if lazy is None else lazy)
    if on_disk:
        # The tying is replaced before the rest gets memory, so that the decoder gets none.
        transcoder.tying = cast(Any, nn.Module())
    give_memory(transcoder, device)
    transcoder.normaliser.reset()
    if on_disk:
        assert imported.decoder is not None
        transcoder.tying = imported.decoder(transcoder.context)
    _fill(transcoder, imported, folder, skip=set(transcoder.tying.views()) if on_disk else set())
    transcoder.normalisation = transcoder.normaliser.settle()
    logger.info("%s: %s%s", folder, imported.kind, ", its decoder left on disk" if on_disk else "")
    return transcoder.eval()


@torch.no_grad()
def _fill(transcoder: Any, imported: Imported, folder: Path, skip: set[str]) -> None:
    """Copy another tool's tensors into a transcoder; those that it lacks keep their first values.

    Raises:
        Refused: a tensor is of another shape; names it.
    """
    for name, target in transcoder.tensors().items():
        value = None if name in skip else imported.tensor(name)
        if value is None:
            continue
        if value.shape != target.shape:
            raise Refused(folder, f"{name} is {list(value.shape)}, expected {list(target.shape)}")
        target.copy_(value)


@torch.no_grad()
def copy_tensors(stored: SlicedTensors, transcoder: Any) -> None:
    """Copy saved tensors, or this rank's part of them, into a transcoder's parameters and statistics.

    Raises:
        Refused: a tensor is missing, left over, or of another shape; names it.
    """
    targets, axes = transcoder.tensors(), transcoder.feature_axes()
    for name in targets.keys() ^ stored.shapes.keys():
        lacking = "lacks" if name in targets else "has an unknown"
        raise Refused(stored.folder, f"{lacking} tensor {name!r}")
    for name, target in targets.items():
        shape, axis = list(target.shape), axes[name]
        if axis is not None:
            shape[axis] = transcoder.n_features
        if shape != stored.shapes[name]:
            raise Refused(stored.folder, f"tensor {name!r} is {stored.shapes[name]}, expected {shape}")
        target.copy_(stored.read(name, axis, transcoder.own))
