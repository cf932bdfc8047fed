"""The folder of a sweep: one process, and nothing of the user's touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from clt_plugins.errors import Refused
from clt_plugins.files.locks import Lock
from clt_plugins.training.saved.folder import foreign

RECORD = "sweep.json"
LOCK = "sweep.lock"


@contextmanager
def sweep_folder(root: Path, resume: bool, labels: Collection[str]) -> Iterator[None]:
    """The sweep's folder, this process's alone.

    Args:
        labels: of the members. Their folders may be there without a record, where a start was killed.

    Raises:
        Refused: there are other things in it, or another sweep; or there is nothing to resume.
    """
    if resume and not (root / RECORD).is_file() and (_other_things(root, labels) or not _begun(root, labels)):
        raise Refused(root, "nothing to resume: no sweep.json in it")
    made = not root.exists()
    if not made and not root.is_dir():
        raise Refused(root, "not a folder: give another one with --out")
    root.mkdir(parents=True, exist_ok=True)
    lock = Lock(root / LOCK)
    try:
        holder = lock.try_acquire()
        if holder is not None:
            raise Refused(root, f"another sweep is in it: {holder}; wait for it, or give another folder with --out")
        if not resume and _other_things(root, labels):
            raise Refused(root, "already there: go on with --resume, or give another folder with --out")
        yield
    finally:
        lock.release()
        if made and not any(root.iterdir()):
            root.rmdir()


def _begun(root: Path, labels: Collection[str]) -> bool:
    """Whether a start has made the folder of a member."""
    return any((root / label).is_dir() for label in labels)


def _other_things(root: Path, labels: Collection[str]) -> bool:
    """Whether there is anything in a sweep's folder besides what a start makes before its first step."""
    if not root.is_dir():
        return False
    own = (LOCK, f".{RECORD}.partial")
    others = (path for path in root.iterdir() if path.name not in own)
    return any(path.name not in labels or not path.is_dir() or foreign(path) for path in others)
