"""Folders that are written atomically: complete or absent.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.files.sliced import own_files

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel

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
        with all_or_none(parallel):
            if lead:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
        with all_or_none(parallel):
            try:
                yield partial
            except SafetensorError as error:
                raise OSError(str(error)) from error
            for path in own_files(partial, parallel):
                listing[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
                _flush(path)
        for theirs in [] if parallel is None else parallel.gather(json.dumps(listing)):
            listing.update(json.loads(theirs))
        with all_or_none(parallel):
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
        raise Refused(folder, f"not a whole folder: {MANIFEST} is missing or damaged") from error
    for name, expected in listing.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise Refused(path, "missing")
        if size != expected["bytes"]:
            raise Refused(path, f"truncated: {size} bytes of {expected['bytes']}")
        if _digest(path) != expected["sha256"]:
            raise Refused(path, f"damaged: its checksum is not the one in {MANIFEST}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise Refused(path, f"not a readable safetensors file: {error}") from error


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises:
    ValueError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(path, f"not a readable JSON file: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
