"""Folders of tensors that are whole or absent, and transcoders in them.

A folder is written beside its place, listed in a `manifest.json` with the size and SHA-256 of each file, flushed to
disk, and only then moved into place; so a crash or a full disk leaves what was there before. Tensors are
safetensors, everything else JSON: reading a folder runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt_plugins.slices import Stored, own_files, put_tensors
from clt_plugins.together import together

if TYPE_CHECKING:
    from clt_plugins.interfaces import Parallel
    from clt_plugins.loading import Plugins
    from clt_plugins.transcoder import CrossLayerTranscoder

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
    from clt_plugins.recipe import plain

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
    folder: Path, *, device: str = "cpu", plugins: Plugins | None = None, kernels: str = "auto"
) -> CrossLayerTranscoder:
    """See `CrossLayerTranscoder.load`."""
    from clt_plugins.loading import load
    from clt_plugins.setup import make_kernels, make_parallel
    from clt_plugins.spec import Context
    from clt_plugins.structure import structure_choice
    from clt_plugins.transcoder import CrossLayerTranscoder

    if not (folder / "transcoder.json").is_file():
        raise ValueError(f"{folder}: not a transcoder: no transcoder.json in it")
    verify(folder)
    described = read_json(folder / "transcoder.json")
    if described.get("format") != FORMAT:
        raise ValueError(f"{folder}: written in format {described.get('format')}, this version reads {FORMAT}")
    plugins = plugins or load()
    where = str(folder / "transcoder.json")
    place = torch.device(device)
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
    transcoder.described_model = described["model"]
    transcoder.to_empty(device=place)
    take_tensors(transcoder, Stored.find(folder, "transcoder"))
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
