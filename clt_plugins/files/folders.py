"""Folders that are written atomically: after a crash or a full disk, a folder is complete, or as it was before.

A folder is written under a temporary name beside its final path. `manifest.json` lists the size and SHA-256 of each
file. Everything is flushed to disk, and only then the folder gets its final name. Tensors are safetensors, everything
else is JSON, so reading a folder runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.files.records import FORMAT, from_data, json_text, read_json, write_json
from clt_plugins.files.sliced import files_of_rank

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel

MANIFEST = "manifest.json"

_umask = os.umask(0o022)  # the mask can be read only by setting it
os.umask(_umask)
FILE_MODE = 0o666 & ~_umask
"""What files may be read and written by, as the user's umask says."""


@attrs.frozen(kw_only=True)
class ManifestFile:
    """One file of a folder."""

    bytes: int
    """Its size."""
    sha256: str
    """Its SHA-256, in hexadecimal."""


@attrs.frozen(kw_only=True)
class Manifest:
    """`manifest.json`: what a complete folder holds."""

    format: int = FORMAT
    """The version of the folder's files."""
    files: dict[str, ManifestFile]
    """All files but the manifest, by their path in the folder."""


@contextmanager
def atomic_folder(folder: Path, parallel: Parallel | None = None) -> Iterator[Path]:
    """Yields a folder to write into. At the end of the block it becomes `folder`; after an error it is deleted.

    A folder that is there already is replaced.

    Args:
        parallel: the ranks that write into it, each its own slices and rank 0 all else; they share a file system.

    Raises:
        OSError: something could not be written (disk full, no permission); names the folder.
    """
    target = folder.resolve()  # `.` and `..` have no name to put a temporary folder beside
    partial = target.with_name(f".{target.name}.partial")
    lead = parallel is None or parallel.rank == 0
    try:
        with all_or_none(parallel):
            if lead:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
        listing: dict[str, ManifestFile] = {}
        with all_or_none(parallel):
            try:
                yield partial
            except SafetensorError as error:
                raise OSError(str(error)) from error
            for path in files_of_rank(partial, parallel):
                name = path.relative_to(partial).as_posix()
                listing[name] = ManifestFile(bytes=path.stat().st_size, sha256=_digest(path))
                # safetensors writes through a temporary file, which only its owner can read.
                path.chmod(FILE_MODE)
                _flush(path)
        listing = _of_all_ranks(listing, parallel)
        with all_or_none(parallel):
            if lead:
                write_json(partial / MANIFEST, Manifest(files=dict(sorted(listing.items()))))
                _move(partial, target)
    except OSError as error:
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: could not be written: {error}") from error
    except BaseException:
        if lead:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _of_all_ranks(listing: dict[str, ManifestFile], parallel: Parallel | None) -> dict[str, ManifestFile]:
    """The files that all ranks wrote; every rank calls it with its own files."""
    if parallel is None:
        return listing
    files: dict[str, ManifestFile] = {}
    for text in parallel.gather(json_text(Manifest(files=listing))):
        files |= from_data(Manifest, json.loads(text)).files
    return files


def _move(partial: Path, folder: Path) -> None:
    """Give a complete folder its final name."""
    # The names of new files are safe only once their folders are on disk too.
    for path in (partial / MANIFEST, *filter(Path.is_dir, partial.rglob("*")), partial):
        _flush(path)
    if folder.exists():
        # A folder that is not empty cannot be replaced by one rename: there are two, and the old one is kept between.
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a crash between the two
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    _flush(folder.parent)


def verify(folder: Path) -> None:
    """Check a folder that `atomic_folder` wrote.

    Raises:
        Faults: a file is missing, truncated or changed; names it.
    """
    if not (folder / MANIFEST).is_file():
        raise Refused(folder, f"not a complete folder: {MANIFEST} is missing")
    for name, expected in read_json(folder / MANIFEST, Manifest).files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Refused(folder / MANIFEST, f"{name!r} is not in the folder")
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise Refused(path, "missing")
        if size != expected.bytes:
            raise Refused(path, f"truncated: {size} bytes of {expected.bytes}")
        if _digest(path) != expected.sha256:
            raise Refused(path, f"damaged: its checksum is not the one in {MANIFEST}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        Refused: it is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise Refused(path, f"not a readable safetensors file: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
