"""Folders that are written atomically: after a crash or a full disk, a folder is complete, or as it was before.

A folder NAME is written as `.NAME.partial` beside its final path. `manifest.json` lists the size and SHA-256 of each
file. Everything is flushed to disk, and only then the folder gets its final name. A folder that was there is exchanged
with it in one step. Where the system cannot do that, the old one is called `.NAME.old` for a moment; a crash in that
moment is repaired by the next one that looks for NAME, reader or writer (`recover`). One process at a time writes a
NAME: others wait (`.NAME.lock`).

Tensors are safetensors, everything else is JSON, so reading a folder runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.files.atomic import FILE_MODE, exchange, flush, reason, remove
from clt_plugins.files.locks import Lock
from clt_plugins.files.records import FORMAT, from_data, json_text, read_json, write_json
from clt_plugins.files.sliced import files_of_rank

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


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

    A folder that is there already is replaced; of a link, what it leads to. If another process is writing the same
    folder, this one waits for it first.

    Args:
        parallel: the ranks that write into it, each its own slices and rank 0 all else; they share a file system.

    Raises:
        OSError: something could not be written (disk full, no permission); names the folder.
    """
    # `.` and `..` have no name to put a temporary folder beside; and a link stays one.
    target = folder.resolve()
    partial, lock = _beside(target, "partial"), Lock(_beside(target, "lock"))
    lead = parallel is None or parallel.rank == 0
    try:
        with all_or_none(parallel, patiently=True):
            if lead:
                _begin(folder, target, partial, lock)
        listing: dict[str, ManifestFile] = {}
        with all_or_none(parallel, patiently=True):
            try:
                yield partial
            except SafetensorError as error:
                raise OSError(str(error)) from error
        # Once all ranks have written: before, the files that safetensors renames at the end have other names.
        with all_or_none(parallel, patiently=True):
            for path in files_of_rank(partial, parallel):
                name = path.relative_to(partial).as_posix()
                listing[name] = ManifestFile(bytes=path.stat().st_size, sha256=_digest(path))
                # safetensors writes through a temporary file, which only its owner can read.
                path.chmod(FILE_MODE)
                flush(path)
        listing = _of_all_ranks(listing, parallel)
        with all_or_none(parallel):
            if lead:
                write_json(partial / MANIFEST, Manifest(files=dict(sorted(listing.items()))))
                _move(partial, target)
    except OSError as error:
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        # Gone if it is the folder by now. Without the lock, it is of the process that is waited for.
        if lock.taken:
            remove(partial)
        lock.release()


def _beside(folder: Path, kind: str) -> Path:
    """A name for temporary things of a folder; no file of a user's has it."""
    return folder.with_name(f".{folder.name}.{kind}")


def _begin(folder: Path, target: Path, partial: Path, lock: Lock) -> None:
    if folder.is_symlink() and not target.exists():
        raise OSError(f"a link to {target}, which is not there: is a disk missing?")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    _repair(target)
    if partial.exists():
        remove(partial)  # of a process that died
    partial.mkdir()


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
        flush(path)
    old = _beside(folder, "old")
    try:
        if folder.exists() and exchange(partial, folder):
            partial.rename(old)  # where it stays if the names cannot be flushed
        else:
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        flush(folder.parent)
    except BaseException:  # Ctrl-C between two renames, too
        if not folder.exists():
            _repair(folder)
        raise
    if old.exists():
        remove(old)


def _repair(folder: Path) -> None:
    """What an interrupted replacement left: the old folder comes back where the new one did not come."""
    old = _beside(folder, "old")
    if not os.path.lexists(old):
        return
    if os.path.lexists(folder):
        remove(old)
        # What cannot be removed now must not be in the way of the next replacement.
        if os.path.lexists(old):
            number = next(n for n in range(1, 10**6) if not os.path.lexists(_beside(folder, f"old-{n}")))
            old.rename(_beside(folder, f"old-{number}"))
    else:
        old.rename(folder)
        flush(folder.parent)


def recover(folder: Path) -> None:
    """Bring back a folder whose replacement was interrupted between its two renames; for readers.

    Nothing happens where it is there, or where there is nothing to bring back, or no permission to do it.
    """
    target = folder.resolve()
    if target.exists() or not target.name or not _beside(target, "old").is_dir():
        return
    lock = Lock(_beside(target, "lock"))
    try:
        lock.acquire()  # a process between its two renames is waited for
        if not target.exists():
            _repair(target)
            logger.warning("%s: its replacement was interrupted; the one before is back", folder)
    except OSError as error:
        logger.warning("%s: its replacement was interrupted; it is in %s: %s", folder, _beside(target, "old"), error)
    finally:
        lock.release()


def sweep(folder: Path, names: str) -> None:
    """Remove what dead processes left of unfinished folders in this one; the caller holds a lock against live ones.

    Args:
        names: a pattern of the finished folders' names.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(f".{names}.old")):
        recover(folder / path.name[1 : -len(".old")])
    for kind in ("partial", "lock", "old", "old-*"):
        for path in folder.glob(f".{names}.{kind}"):
            remove(path)


def listed_files(folder: Path, needs: Sequence[str] = ()) -> dict[str, ManifestFile]:
    """What the manifest of a folder says of its files.

    Args:
        needs: see `check_folder`.

    Raises:
        Faults: the manifest is damaged.
    """
    manifest = folder / MANIFEST
    listed = read_json(manifest, Manifest).files
    for pattern in needs:
        if not any(PurePosixPath(name).match(pattern) for name in listed):
            raise Refused(manifest, f"damaged: it lists no {pattern}")
        for path in sorted(folder.glob(pattern)):
            if path.name not in listed:
                raise Refused(manifest, f"damaged: it does not list {path.name}")
    return listed


def check_folder(folder: Path, needs: Sequence[str] = (), parallel: Parallel | None = None) -> None:
    """Check a folder that `atomic_folder` wrote.

    Args:
        needs: patterns of files that the manifest must list at least one of; and it must list all of them that exist.
        parallel: ranks that all call it: each reads its share of the files.

    Raises:
        Faults: a file is missing, truncated or changed; names it.
        OSError: a file cannot be read, which is no damage; names it.
    """
    recover(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise Refused(folder, f"not a complete folder: {MANIFEST} is missing")
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    for number, (name, expected) in enumerate(listed_files(folder, needs).items()):
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Refused(manifest, f"{name!r} is not in the folder")
        try:
            size = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            size = None
        if size is None:
            raise Refused(path, "missing")
        if size != expected.bytes:
            raise Refused(path, f"truncated: {size} bytes of {expected.bytes}")
        if number % world == rank and _digest(path) != expected.sha256:
            raise Refused(path, f"damaged: its checksum is not the one in {MANIFEST}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        Refused: it is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's mapping raises the second
        raise Refused(path, f"not a readable safetensors file: {error}") from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {reason(error)}") from error
