"""Folders of tensors that are whole or absent, and transcoders in them.

A folder is written beside its place, listed in a `manifest.json` with the size and SHA-256 of each file, flushed to
disk, and only then moved into place; so a crash or a full disk leaves what was there before. Tensors are
safetensors, everything else JSON: reading a folder runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clt_plugins.distributed.agree import together
from clt_plugins.files.sliced import Stored, own_files, put_tensors

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


@contextmanager
def whole_folder(folder: Path, parallel: Parallel | None = None) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all went well, and vanishes otherwise.

    Args:
        parallel: the ranks that write into it, each its own slices and rank 0 all else; they share a file system.

    Raises:
        OSError: something could not be written (disk full, no permission), naming the folder.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    lead = parallel is None or parallel.rank == 0
    listing: dict[str, Any] = {}
    try:
        with together(parallel):
            if lead:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
        with together(parallel):
            try:
                yield partial
            except SafetensorError as error:
                raise OSError(str(error)) from error
            for path in own_files(partial, parallel):
                listing[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
                _flush(path)
        for theirs in [] if parallel is None else parallel.gather(json.dumps(listing)):
            listing.update(json.loads(theirs))
        with together(parallel):
            if lead:
                write_json(partial / MANIFEST, {"format": FORMAT, "files": dict(sorted(listing.items()))})
                _move(partial, folder)
    except OSError as error:
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: could not be written: {error}") from error
    except BaseException:
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _move(partial: Path, folder: Path) -> None:
    """Put a written folder into its place."""
    for path in (partial / MANIFEST, partial):
        _flush(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    _flush(folder.parent)


def verify(folder: Path) -> None:
    """Check a folder written by `whole_folder`.

    Raises:
        ValueError: a file is missing, truncated or changed; names it.
    """
    try:
        listing = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a whole folder: {MANIFEST} is missing or damaged") from error
    for name, expected in listing.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ValueError(f"{path}: missing")
        if size != expected["bytes"]:
            raise ValueError(f"{path}: truncated: {size} bytes of {expected['bytes']}")
        if _digest(path) != expected["sha256"]:
            raise ValueError(f"{path}: damaged: its checksum is not the one in {MANIFEST}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises:
    ValueError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- transcoders ------------------------------------------------------------------------------------------------


def put_transcoder(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Write a transcoder's two files into a folder that `whole_folder` made."""
    from clt_plugins import __version__
    from clt_plugins.recipe.read import plain

    parallel = transcoder.context.parallel
    put_tensors(folder, "transcoder", transcoder.tensors(), transcoder.feature_axes(), parallel, transcoder.features)
    if parallel.rank > 0:
        return
    described = {
        "format": FORMAT,
        "clt_plugins": __version__,
        "layers": transcoder.layers,
        "d_model": transcoder.d_model,
        "features": transcoder.features,
        "dtype": str(transcoder.context.dtype).removeprefix("torch."),
        "normalisation": transcoder.normalisation,
        "model": transcoder.model_described(),
        **{slot: plain(chosen) for slot, chosen in transcoder.choices.items()},
    }
    write_json(folder / "transcoder.json", described)


def save_transcoder(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Write a transcoder as a folder, whole or not at all; on several ranks, each its slices."""
    with whole_folder(folder, transcoder.context.parallel) as partial:
        put_transcoder(transcoder, partial)


def load_transcoder(
    folder: Path,
    *,
    device: str = "cpu",
    plugins: Plugins | None = None,
    kernels: str = "auto",
    lazy: bool | None = None,
) -> CrossLayerTranscoder:
    """See `CrossLayerTranscoder.load`."""
    from clt_plugins.registry.plugins import load

    plugins = plugins or load()
    if not (folder / "transcoder.json").is_file():
        return import_transcoder(folder, device=device, plugins=plugins, kernels=kernels, lazy=lazy)
    verify(folder)
    described = read_json(folder / "transcoder.json")
    if described.get("format") != FORMAT:
        raise ValueError(f"{folder}: written in format {described.get('format')}, this version reads {FORMAT}")
    transcoder = _empty(described, str(folder / "transcoder.json"), torch.device(device), plugins, kernels)
    transcoder.to_empty(device=device)
    take_tensors(transcoder, Stored.find(folder, "transcoder"))
    return transcoder.eval()


def _empty(
    described: Mapping[str, Any], where: str, place: torch.device, plugins: Plugins, kernels: str
) -> CrossLayerTranscoder:
    """A transcoder as `transcoder.json` describes it, without memory."""
    from clt_plugins.contract.spec import Context
    from clt_plugins.model.assemble import make_kernels, make_parallel
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.recipe.structure import structure_choice

    context = Context(
        recipe=None,
        seed=0,
        device=torch.device("meta"),
        dtype=getattr(torch, described["dtype"]),
        batch_tokens=0,
        steps=0,
        kernels=make_kernels(kernels, place, plugins),
        parallel=make_parallel("single", plugins),
        layers=described["layers"],
        d_model=described["d_model"],
        features=described["features"],
    )
    activation, tying = (structure_choice(plugins, slot, described[slot], where) for slot in ("activation", "tying"))
    transcoder = CrossLayerTranscoder(context, activation, tying, normalisation=described["normalisation"])
    transcoder.described_model = dict(described["model"])
    return transcoder


LAZY_ABOVE = 2**31
"""Bytes of a decoder in another tool's folder above which it stays on disk."""


def import_transcoder(
    folder: Path, *, device: str, plugins: Plugins, kernels: str, lazy: bool | None
) -> CrossLayerTranscoder:
    """A transcoder from another tool's files, by the first exporter that recognises them.

    Raises:
        ValueError: nobody does, or the files are not whole; says what is there.
    """
    from clt_plugins.contract.spec import Context

    if not folder.exists():
        raise ValueError(f"{folder}: no such folder")
    for choice in plugins.choices("exports").values():
        reader = choice.spec.build(choice.spec.config(), cast(Context, None))
        if hasattr(reader, "recognises") and reader.recognises(folder):
            break
    else:
        raise ValueError(f"{folder}: not a transcoder: no transcoder.json in it, nor another tool's format")
    found = reader.read(folder)
    described = {
        "dtype": "float32",
        "normalisation": "none",
        **{name: getattr(found, name) for name in ("layers", "d_model", "features", "activation", "tying", "model")},
    }
    place = torch.device(device)
    transcoder = _empty(described, str(folder), place, plugins, kernels)
    keep = found.decoder is not None and (found.decoder_bytes > LAZY_ABOVE if lazy is None else lazy)
    if keep:
        # Put in before memory is given to the rest, so that none is given to the decoder.
        transcoder.tying = cast(Any, nn.Module())
    transcoder.to_empty(device=place)
    transcoder.normaliser.reset()
    if keep:
        assert found.decoder is not None
        transcoder.tying = found.decoder(transcoder.context)
    with torch.no_grad():
        for name, target in transcoder.tensors().items():
            if keep and name in transcoder.tying.views():
                continue
            value = found.tensor(name)
            if value is None:
                continue
            if value.shape != target.shape:
                raise ValueError(f"{folder}: {name} is {list(value.shape)}, expected {list(target.shape)}")
            target.copy_(value)
    statistics = transcoder.normaliser
    shifts, scales = (
        torch.stack([statistics.get_buffer(f"{side}_{kind}") for side in ("input", "target")])
        for kind in ("shift", "scale")
    )
    if bool(shifts.any()) or bool((scales != 1).any()):
        transcoder.normalisation, statistics.identity = "mean_std", False
    logger.info("%s: %s%s", folder, found.kind, ", its decoder left on disk" if keep else "")
    return transcoder.eval()


@torch.no_grad()
def take_tensors(transcoder: CrossLayerTranscoder, stored: Stored) -> None:
    """Copy saved tensors, or this rank's part of them, into a transcoder's parameters and statistics.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape; names it.
    """
    own, axes = transcoder.tensors(), transcoder.feature_axes()
    for name in own.keys() ^ stored.shapes.keys():
        lacking = "lacks" if name in own else "has an unknown"
        raise ValueError(f"{stored.folder}: {lacking} tensor {name!r}")
    for name, target in own.items():
        shape, axis = list(target.shape), axes[name]
        if axis is not None:
            shape[axis] = transcoder.features
        if shape != stored.shapes[name]:
            raise ValueError(f"{stored.folder}: tensor {name!r} is {stored.shapes[name]}, expected {shape}")
        target.copy_(stored.read(name, axis, transcoder.own))
